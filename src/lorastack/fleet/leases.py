"""Leases: which folders of a cache live processes use, and how much room they asked for; locks that end with them.

Every file is locked with ``flock``, which the system lets go of however a process ends, so nothing has to be cleaned up
before others can go on. All of it lies in ``.lorastack`` in the cache: one lock for short looks at the cache, a few for
baking (a mixture has the one that its key says), and one file for each process with what it leases.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorastack.errors import UnsupportedError
from lorastack.files import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PLACE, _LEASE = ".lorastack", "lease-"
#: Locks for baking: two mixtures of one lock wait for each other, and no file is left for each mixture there ever was.
_STRIPES = 16


class Leases:
    """What this process and others lease in one cache.

    Raises
    ------
    OutputError
        When the folder cannot be written to, or its file system knows no locks.
    """

    def __init__(self, cache: Path) -> None:
        if fcntl is None:
            raise UnsupportedError("a cache of mixtures needs file locks, which this system lacks")
        self._place = cache / _PLACE
        self._own: dict[str, int] = {}
        self._file: int | None = None
        self._process = os.getpid()
        try:
            self._place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache}: the cache cannot be made: {error.strerror}") from error

    @property
    def own(self) -> Mapping[str, int]:
        """Key -> bytes of what this process leases."""
        return self._own if self._process == os.getpid() else {}

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Nobody else takes a lease, or drops a folder, inside: it is short."""
        with self._locked("look.lock"):
            yield

    @contextlib.contextmanager
    def baking(self, key: str) -> Iterator[None]:
        """Nobody else bakes that mixture inside, in this process or another."""
        with self._locked(f"bake-{int(key[:8], 16) % _STRIPES}.lock"):
            yield

    def take(self, key: str, size: int) -> None:
        """Lease a folder of so many bytes to this process; `looking` only."""
        self._write({**self.own, key: size})

    def give_back(self, key: str) -> None:
        """End a lease of this process; `looking` only."""
        self._write({one: size for one, size in self.own.items() if one != key})

    def all(self) -> dict[str, int]:
        """Key -> bytes of what live processes lease; files of those that ended are removed. `looking` only."""
        found = dict(self.own)
        for path in self._place.glob(f"{_LEASE}*"):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    for line in file.read().decode().splitlines():
                        key, _, size = line.partition(" ")
                        found[key] = max(found.get(key, 0), int(size))
                else:
                    path.unlink()
        return found

    def _write(self, leases: dict[str, int]) -> None:
        if self._file is None or self._process != os.getpid():  # the parent's lock would be let go of with the parent
            self._file, _ = tempfile.mkstemp(prefix=_LEASE, dir=self._place)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._process = os.getpid()
        raw = "".join(f"{key} {size}\n" for key, size in leases.items()).encode()
        os.pwrite(self._file, raw, 0)
        os.ftruncate(self._file, len(raw))
        self._own = leases

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            file = os.open(self._place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{self._place / name}: it cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)
