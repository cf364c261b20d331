"""Worker: one process that runs one target over and over, and writes down what it finds.

The runner starts it with a folder of its own, ``scratch``: there it reads the input that the worker was at should it
die or hang, and what was done.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.guard import Finding

#: No hub is asked; set before its client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

#: Further than this no input may take the address space: the machine is others' too.
ROOM = 4 << 30
#: What hangs outside Python's reach is ended after this many seconds.
HANGS = 60
#: None is kept to start from that is longer, or takes more of the processor's time: of it come others like it.
LONGEST, SLOWEST = 1 << 16, 0.3
#: Inputs that were answered in a way of their own are kept to start from, so many at most.
MOST_KEPT = 3000
#: And so many that were taken: changed once more, they reach further than what was refused.
MOST_SOUND = 100


class Session:
    """What one worker has run and found."""

    def __init__(self, name: str, findings: Path, scratch: Path) -> None:
        from tests.fuzz.corpus import every
        from tests.fuzz.guard import workplace
        from tests.fuzz.targets import TARGETS

        self.target, self.findings, self.scratch = TARGETS[name], findings / name, scratch
        self.runs = self.taken = 0
        self.found: dict[str, str] = {}
        self.answers: set[str] = set()
        self.pool: list[bytes] = []
        self.sound: list[bytes] = []
        self._place = workplace(scratch)
        self._empty = self._place.__enter__()
        self._running = os.open(scratch / "running", os.O_RDWR | os.O_CREAT)
        self._warm_up()
        for make in every(name).values():
            self.run(make())

    def _warm_up(self) -> None:
        """At first, imports and caches take memory that is no input's fault."""
        from tests.fuzz.guard import Finding, answer

        for data in self.target.seeds():
            self._note(data)
            try:
                answer(self.target.work, data, self._empty())
            except Finding:
                continue  # found again in a moment

    def run(self, data: bytes) -> None:
        """Run one input, and keep it if its answer is a new one."""
        from tests.fuzz.guard import Finding, answer

        self._note(data)
        self.runs += 1
        began = time.process_time()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            said = answer(self.target.work, data, self._empty())
        except Finding as finding:
            self._write(data, finding)
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        if len(data) > LONGEST or time.process_time() - began > SLOWEST:
            return
        if said == "taken":
            self._keep_sound(data)
        if said not in self.answers and len(self.pool) < MOST_KEPT:
            self.answers.add(said)
            self.pool.append(data)

    def _note(self, data: bytes) -> None:
        """Write down what is run, in case that nothing is written any more."""
        os.pwrite(self._running, data, 0)
        os.ftruncate(self._running, len(data))

    def _keep_sound(self, data: bytes) -> None:
        if len(self.sound) < MOST_SOUND:
            self.sound.append(data)
        elif self.taken % 7 == 0:
            self.sound[self.taken % MOST_SOUND] = data
        self.taken += 1

    def _write(self, data: bytes, finding: Finding) -> None:
        """Keep the shortest input of each kind of finding, under the name of the first."""
        from tests.fuzz.corpus import name_of

        first = finding.where not in self.found
        path = self.findings / self.found.setdefault(finding.where, name_of(data))
        if first or path.stat().st_size > len(data):
            self.findings.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if first:
            print(f"FOUND {finding}\n      replay: python -m tests.fuzz replay {path}", flush=True)

    def some(self, rng: random.Random) -> bytes:
        """An input to start from."""
        return rng.choice(self.sound if self.sound and rng.random() < 0.6 else self.pool)

    def close(self) -> None:
        """Say what was done, for the runner."""
        (self.scratch / "running").unlink(missing_ok=True)
        said = {"runs": self.runs, "taken": self.taken, "answers": len(self.answers), "found": self.found}
        (self.scratch / "done.json").write_text(json.dumps(said))
        self._place.__exit__(None, None, None)


def mutate(session: Session, end: float, seed: int) -> None:
    """The mutator by itself: from inputs that were answered in ways of their own."""
    from tests.fuzz.mutator import mutated

    rng = random.Random(seed)
    while time.monotonic() < end and session.pool:
        session.run(mutated(session.some(rng), session.pool, session.target.form, rng, LONGEST))
    session.close()


def guide(session: Session, end: float, seed: int) -> None:
    """The same mutator, steered by atheris to inputs that reach new code."""
    import atheris

    from tests.fuzz.mutator import mutated

    def one(data: bytes) -> None:
        session.run(data)
        if time.monotonic() > end:
            session.close()
            os._exit(0)  # libFuzzer itself leaves without a word to Python

    def change(data: bytes, longest: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, longest))
        start = session.some(rng) if session.pool and rng.random() < 0.2 else data
        return mutated(start, session.pool, session.target.form, rng, longest)

    corpus = session.scratch / "corpus"
    corpus.mkdir()
    for n, data in enumerate(session.pool):
        (corpus / f"{n:04}").write_bytes(data)
    options = (f"-seed={seed + 1}", f"-max_len={LONGEST}", f"-timeout={HANGS}", f"-artifact_prefix={session.scratch}/",
               "-entropic_scale_per_exec_time=1", "-rss_limit_mb=0", "-verbosity=0")  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    """Run one target for some seconds."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.worker")
    parser.add_argument("target")
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("findings", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--atheris", action="store_true")
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    if asked.atheris:
        import atheris

        with atheris.instrument_imports(include=["lorastack"]):
            import lorastack.inspect
            import lorastack.recipe  # noqa: F401
    _limit()
    session = Session(asked.target, asked.findings, asked.scratch)
    # Starting took some of the time, on a busy machine all of it.
    (guide if asked.atheris else mutate)(session, max(end, time.monotonic() + 1), asked.seed)


def _limit() -> None:
    """Keep the process within the room there is, so that no input takes the machine's memory."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
