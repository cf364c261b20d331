"""A program of the tests: it bakes mixtures into a full cache, and is ended inside one system call after another.

While it is, another process leases one of the folders. What lies in the cache then, and what the next process makes of
it, is printed as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from tests.fleet.makers import adapter, library
from tests.killing import CALLS, spread
from tests.traced import traced


def main(folder: Path, base: str, count: int) -> None:
    from lorastack import load
    from lorastack.fleet import Baking, MixtureCache
    from lorastack.fleet.baking import bytes_of

    library(folder / "loras", rank=64)
    place = folder / "cache"
    # For the leased one and the new one, not for the one that nobody leases.
    room = bytes_of(adapter(0, rank=64)) + bytes_of(adapter(0, rank=128))

    def run(name: str) -> int:
        MixtureCache(place, folder / "loras", Baking(base), max_bytes=room).get(name)
        return 0

    def bake(name: str) -> int:
        pid = os.fork()
        if not pid:
            os._exit(run(name))
        return os.waitpid(pid, 0)[1]

    def fresh() -> MixtureCache:
        shutil.rmtree(place, ignore_errors=True)
        own = MixtureCache(place, folder / "loras", Baking(base), max_bytes=room)
        own.get("a0")  # leased here
        assert bake("a1") == 0  # leased by nobody any more, so that it is dropped
        return own

    own = fresh()
    leased = own.get("a0")
    log = folder / "log"
    work = partial(run, "a0+a2:0.5")
    traced(work, "-e", "trace=" + ",".join(f"?{call}" for call in CALLS), "-o", str(log))
    said = [line.partition("(")[0] for line in log.read_text().splitlines() if "(" in line and line[0].isalpha()]
    found = []
    for call, which in spread(said, count):
        own.give_back("a0")
        own = fresh()
        status = traced(
            work, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={which}", "-o", os.devnull
        )
        broken = []
        for path in place.iterdir():
            if not path.name.startswith("."):
                try:
                    load(path).check()
                except Exception as error:  # whatever it is, it is told
                    broken.append(f"{path.name}: {error}")
        there = leased.is_dir()
        again = bake("a0+a2:0.5")
        found.append({
            "call": call, "which": which, "killed": os.WIFSIGNALED(status), "broken": broken, "leased": there,
            "again": again, "still": leased.is_dir(),
            "left": sorted(path.name for path in place.iterdir() if path.name.endswith(".partial")),
            "folders": len(list(place.glob("[0-9a-f]*"))), "leases": len(list((place / ".lorastack").glob("lease-*"))),
            "bytes": sum(file.stat().st_size for file in place.glob("[0-9a-f]*/*")), "room": room,
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
