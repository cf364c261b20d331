"""A program of the tests: it writes an adapter many times over, and is ended inside one system call after the other.

It forks children that have everything imported already and stop themselves; each is traced, goes on, and is ended by a
signal. What is at the final place then, what is left, and what the next run makes of it is printed as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

from tests.traced import traced

CALLS = (
    "mkdir mkdirat openat write pwrite64 writev ftruncate fsync rename renameat renameat2 link linkat unlink unlinkat "
    "rmdir chmod fchmod fchmodat flock close newfstatat statx getdents64"
).split()


class Job:
    """One way to write an adapter: ``run(n)`` writes the n-th content to ``target``."""

    def __init__(self, folder: Path, how: str) -> None:
        from lorastack import save

        self.how, self.place = how, folder / "work"
        self.target = self.place / ("a.gguf" if how.endswith("gguf") else "a")
        self.source = folder / ("source.gguf" if how.endswith("gguf") else "source")
        if not self.source.exists():
            save(lora(self.gguf), self.source, architecture="llama" if self.gguf else None)

    @property
    def gguf(self) -> bool:
        return self.how.endswith("gguf")

    def run(self, content: int, force: bool) -> int:
        from lorastack import load, save
        from lorastack.cli import main

        if self.how == "save":
            save(load(self.source).scaled(content), self.target, force=force)
            return 0
        verb = self.how.partition(" ")[0]
        words = {
            "bake": ["bake", f"{self.source}:{content}"],
            "resize": ["resize", str(self.source), "--rank", str(content)],
        }[verb]
        sys.argv = ["lorastack", *words, "-o", str(self.target), *(["--force"] if force else [])]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        return 0

    def content(self) -> dict[str, bytes] | None:
        """Every byte at the final place."""
        if not os.path.lexists(self.target):
            return None
        files = [self.target] if self.target.is_file() else sorted(self.target.rglob("*"))
        return {str(file.relative_to(self.place)): file.read_bytes() for file in files}


def lora(gguf: bool) -> object:
    import numpy as np

    from lorastack import LoadedLora

    rng = np.random.default_rng(0)
    weights = ["blk.0.attn_q.weight", "blk.1.attn_q.weight"] if gguf else [
        "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]  # fmt: skip
    pairs = {name: (rng.standard_normal((4, 32), np.float32), rng.standard_normal((32, 4), np.float32))
             for name in weights}  # fmt: skip
    return LoadedLora.from_tensors(pairs, name="x", naming="gguf" if gguf else "hf")


def plain(job: Job, content: int, force: bool) -> int:
    """The status of a child that nobody traces."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(job.run(content, force))
    return os.waitpid(pid, 0)[1]


def spread(said: list[str], count: int) -> list[tuple[str, int]]:
    """``count`` of the calls, as a name and which of that name: each name in turn, rare ones first, from end to end."""
    numbers = defaultdict(int)
    by_name: dict[str, list[int]] = defaultdict(list)
    for call in said:
        numbers[call] += 1
        by_name[call].append(numbers[call])
    share = dict.fromkeys(by_name, 0)
    for name in itertools.cycle(sorted(by_name, key=lambda name: len(by_name[name]))):
        if sum(share.values()) == min(count, len(said)):
            break
        share[name] += share[name] < len(by_name[name])
    return [
        (name, all_of_it[n * (len(all_of_it) - 1) // max(share[name] - 1, 1)])
        for name, all_of_it in by_name.items()
        for n in range(share[name])
    ]


def main(folder: Path, how: str, renameat2: str, count: int) -> None:
    if renameat2 == "lacking":
        from lorastack.files import moves

        moves._function = lambda: None
    job = Job(folder, how)

    def fresh(force: bool) -> None:
        shutil.rmtree(job.place, ignore_errors=True)
        job.place.mkdir()
        if force:
            assert plain(job, 1, False) == 0

    fresh(False)
    stdout = os.dup(1)
    os.dup2(2, 1)
    assert job.run(3, False) == 0  # here, so that what is imported on the way is there in every child
    os.dup2(stdout, 1)
    known: dict[str, object] = {}
    for content in (1, 2, 3):
        assert plain(job, content, True) == 0
        known[str(content)] = job.content()
    assert len({str(one) for one in known.values()}) == 3
    found = []
    for force, number in itertools.product((False, True), (signal.SIGKILL, signal.SIGTERM)):
        fresh(force)
        log = folder / "log"
        traced(partial(job.run, 2, force), "-e", "trace=" + ",".join(f"?{call}" for call in CALLS), "-o", str(log))
        said = [line.partition("(")[0] for line in log.read_text().splitlines() if "(" in line and line[0].isalpha()]
        for call, which in spread(said, count // 4):
            fresh(force)
            inject = f"inject={call}:signal={number.name}:when={which}"
            status = traced(partial(job.run, 2, force), "-e", f"trace={call}", "-e", inject, "-o", os.devnull)
            at_place = job.content()
            state = next((key for key, value in known.items() if value == at_place), at_place and "partial")
            aside = [str(path.relative_to(job.place)) for path in job.place.glob(".*.partial/old/*")]
            left = sorted(path.name for path in job.place.iterdir() if path != job.target)
            again = plain(job, 3, True)
            found.append({
                "force": force, "signal": number.name, "call": call, "which": which, "status": status, "state": state,
                "aside": bool(aside), "left": left, "again": again, "whole": job.content() == known["3"],
                "names": sorted(path.name for path in job.place.iterdir()), "target": job.target.name,
            })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]))
