"""The fuzzers' command: `python -m tests.fuzz run` and `replay FILE`. `make fuzz` calls the first.

Every target gets its share of the time in a process of its own, which may die or hang.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

#: Where findings are kept, unless somebody says another place.
FINDINGS = Path("fuzz-findings")
#: A worker that is this many seconds over its time hangs.
GRACE = 120
#: A target whose process dies so often is left alone.
MOST_DEATHS = 10


@dataclass
class Done:
    """What came of one target."""

    runs: int = 0
    taken: int = 0
    answers: int = 0
    found: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run or replay; 1 when there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="look for inputs that break the library")
    run.add_argument("--seconds", type=float, default=60, help="in all, shared by the targets")
    run.add_argument("--target", action="append", help="only this one; may be given again")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--engine", choices=["atheris", "mutator"], help="atheris where it is installed, if not given")
    run.add_argument("--findings", type=Path, default=FINDINGS)
    replay = commands.add_parser("replay", help="run one input again, and show where it goes")
    replay.add_argument("file", type=Path, help="TARGET/NAME, as findings and the corpus lie")
    asked = parser.parse_args()
    return run_all(asked) if asked.command == "run" else again(asked.file)


def run_all(asked: argparse.Namespace) -> int:
    """Run every target for its share of the time, and say what was found."""
    from tests.fuzz.targets import TARGETS

    engine = asked.engine or ("atheris" if importlib.util.find_spec("atheris") else "mutator")
    names = asked.target or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        print(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
        return 2
    share = asked.seconds / len(names)
    print(f"{len(names)} targets by {engine}, {share:.0f} s each, seed {asked.seed}", flush=True)
    found = runs = 0
    for name in names:
        began = time.monotonic()
        done = _run_one(name, engine, share, asked.seed, asked.findings)
        rate = done.runs / (time.monotonic() - began)
        print(f"{name:13} {done.runs:8} runs, {rate:6.0f}/s, {done.taken:7} taken, {done.answers:5} answers, "
              f"{len(done.found)} findings", flush=True)  # fmt: skip
        found, runs = found + len(done.found), runs + done.runs
    print(f"{runs} runs: " + (f"{found} findings, in {asked.findings}" if found else "nothing found"))
    return int(found > 0)


def _run_one(target: str, engine: str, seconds: float, seed: int, findings: Path) -> Done:
    """One worker after another until the time is over: each goes on behind an input that the last one died of."""
    from tests.fuzz.guard import memory

    end = time.monotonic() + seconds
    done = Done()
    for death in range(MOST_DEATHS):
        left = end - time.monotonic()
        if death and left < 2:
            break
        with tempfile.TemporaryDirectory(prefix="lorastack-fuzz-", dir=memory()) as folder:
            scratch = Path(folder)
            words = [
                sys.executable,
                "-m",
                "tests.fuzz.worker",
                target,
                str(left),
                str(seed + death),
                str(findings),
                folder,
            ]
            words += ["--atheris"] if engine == "atheris" else []
            environment = {**os.environ, "HF_HOME": folder, "TMPDIR": folder}
            with (scratch / "log").open("wb") as log:
                try:
                    ended = subprocess.run(
                        words, timeout=left + GRACE, env=environment, stderr=log, check=False
                    ).returncode
                except subprocess.TimeoutExpired:
                    ended = -1
            if (scratch / "done.json").exists():
                said = json.loads((scratch / "done.json").read_text())
                done = Done(done.runs + said["runs"], done.taken + said["taken"], done.answers + said["answers"],
                            done.found | said["found"])  # fmt: skip
                break
            name = _keep_running(scratch, findings / target, f"the process ended with {ended}, or hung")
            if name in done.found.values():
                break  # it dies of what it starts with, again and again
            done.found[name] = name
    return done


def _keep_running(scratch: Path, folder: Path, where: str) -> str:
    """A worker died: what it was at is a finding, and its last words lie beside it."""
    from tests.fuzz.corpus import name_of

    folder.mkdir(parents=True, exist_ok=True)
    running = scratch / "running"
    path = folder / name_of(running.read_bytes() if running.exists() else b"")
    if running.exists():
        shutil.copyfile(running, path)
    shutil.copyfile(scratch / "log", path.with_suffix(".log"))
    print(f"FOUND {where}; see {path}.log\n      replay: python -m tests.fuzz replay {path}", flush=True)
    return path.name


def again(file: Path) -> int:
    """Run one input again, once imports and caches are no input's fault any more."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.fuzz.guard import Finding, answer, workplace
    from tests.fuzz.targets import TARGETS

    target = TARGETS[file.resolve().parent.name]
    with workplace() as empty:
        for seed in target.seeds():
            answer(target.work, seed, empty())
        try:
            print(answer(target.work, file.read_bytes(), empty()))
        except Finding as finding:
            traceback.print_exception(finding)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
