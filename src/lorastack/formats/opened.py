"""OpenedFile: one open of a file, from which header, numbers and hash are read, so that they are of one content.

A path says nothing of what lies there a moment later: a new version is moved or copied over it while the old one is
in use. So a file is opened once, and known from then on by its number, size and times: every single read is held
against them. Its descriptor is closed when many others are open, and the file opened again when it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from lorastack.errors import FormatError

#: So many descriptors stay open: a process may have 256 in all, and a thousand adapters loaded.
HELD = 64
#: A system stamps times by its clock's tick, a hundred a second or more: two changes within one may look alike.
TICK = 0.01
_FLAGS = os.O_RDONLY
for _flag in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _FLAGS |= getattr(os, _flag, 0)
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
          stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}  # fmt: skip
_CHUNK = 1 << 20


class OpenedFile(os.PathLike[str]):
    """A regular file as it was when opened: ``path`` and ``size``; what is read later is of that content, or an error.

    Raises
    ------
    FormatError
        When it cannot be opened, or is a pipe, a device, a socket or a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path if isinstance(path, Path) else Path(path)
        # The working directory may be another when it is opened again.
        self._place = self.path if self.path.is_absolute() else Path(os.path.abspath(self.path))
        self._sha256: str | None = None
        self._descriptor: _Descriptor | None
        self._descriptor, status = _open(self.path)
        self._was = _settled(self._descriptor.number, status)
        self.size = self._was.st_size
        _hold(self)

    @classmethod
    def of(cls, file: str | Path | OpenedFile) -> OpenedFile:
        """``file`` itself if it is open, else the file at that path."""
        return file if isinstance(file, OpenedFile) else cls(file)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def version(self) -> tuple[int, ...]:
        """What tells its content from any other's; see `version_of`."""
        return version_of(self._was)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"OpenedFile({str(self.path)!r}, {self.size} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on.

        Raises
        ------
        FormatError
            When the file is shorter, was changed since it was opened, or cannot be read.
        """
        with self._descriptor_in_use() as descriptor:
            return _read(descriptor, start, size)

    def array(self, start: int, size: int) -> np.ndarray:
        """The same as an array of bytes, in memory of its own."""
        out = np.empty(size, np.uint8)
        with self._descriptor_in_use() as descriptor:
            _fill(descriptor, memoryview(out.data), start)
        return out

    def fill(self, room: np.ndarray, start: int) -> None:
        """The same into an array of bytes that is there already."""
        with self._descriptor_in_use() as descriptor:
            _fill(descriptor, memoryview(room.data), start)

    def stream(self) -> BinaryIO:
        """For those who read from a stream; each part that they read is checked as `read` does."""
        return cast(BinaryIO, io.BufferedReader(_Stream(self), _CHUNK >> 4))

    def whole(self) -> bytes:
        """All its bytes, for small files: their hash is taken along."""
        raw = self.read(0, self.size)
        self._sha256 = hashlib.sha256(raw).hexdigest()
        return raw

    def sha256(self) -> str:
        """The hash of all its bytes, of which `read` gives a part."""
        if self._sha256 is None:
            self._sha256 = _SUMS.get(self.version)
        if self._sha256 is None:
            total = hashlib.sha256()
            room = memoryview(bytearray(min(_CHUNK, self.size)))
            with self._descriptor_in_use() as descriptor:
                for start in range(0, self.size, _CHUNK):
                    part = room[: self.size - start]
                    _fill(descriptor, part, start)
                    total.update(part)
            self._sha256 = total.hexdigest()
            with _LOCK:
                _SUMS[self.version] = self._sha256
                while len(_SUMS) > _MOST_SUMS:
                    del _SUMS[next(iter(_SUMS))]
        return self._sha256

    @contextlib.contextmanager
    def _descriptor_in_use(self) -> Iterator[int]:
        """The descriptor to read from, opened again if it was closed for others; checks what was read at the end."""
        try:
            descriptor = self._descriptor
            if descriptor is None:
                descriptor = self._descriptor = _open(self._place)[0]
                _hold(self)
            yield descriptor.number
            same = self._is(os.fstat(descriptor.number))
        except EOFError:
            same = False
        except OSError as error:
            raise FormatError(f"{self.path}: it cannot be read: {error.strerror or error}") from error
        if not same:
            raise FormatError(f"{self.path}: it was changed or replaced since it was opened; load it again")

    def _is(self, now: os.stat_result) -> bool:
        """Whether a descriptor leads to the file that was opened, and nobody has written to it."""
        was = self._was
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
            was.st_dev, was.st_ino, was.st_size, was.st_mtime_ns):  # fmt: skip
            return False
        # Times can be set back, but for the last. Of a file that lost its last name, deleted or replaced, it tells
        # that only, and nobody can open such a file any more to write to it.
        return now.st_ctime_ns == was.st_ctime_ns or now.st_nlink == 0


class _Stream(io.RawIOBase):
    """An opened file from a place of its own on."""

    def __init__(self, file: OpenedFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence])
        return self._at

    def readinto(self, room: Any) -> int:
        count = max(0, min(len(room), self._file.size - self._at))
        with self._file._descriptor_in_use() as descriptor:
            _fill(descriptor, memoryview(room)[:count], self._at)
        self._at += count
        return count


class _Descriptor:
    """Closed when nobody uses it any more: a thread may read from one that another has given up."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Any = os.close) -> None:
        with contextlib.suppress(OSError):
            close(self.number)


def version_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells one version of a file from any other, whatever it is called.

    The time of the last change to the file's entry is of it, since the other one can be set back.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


#: Version of a file -> its hash, so that a large one is read through once.
_SUMS: dict[tuple[int, ...], str] = {}
_MOST_SUMS = 1 << 14
#: The files whose descriptors are open, the one opened longest ago first.
_HOLDING: deque[weakref.ref[OpenedFile]] = deque()
_LOCK = threading.Lock()


def _hold(file: OpenedFile) -> None:
    """Note that the file has a descriptor, and give up the oldest ones of too many."""
    with _LOCK:
        _HOLDING.append(weakref.ref(file))
        while len(_HOLDING) > HELD:
            _give_up_oldest()


def _give_up_oldest() -> None:
    file = _HOLDING.popleft()()
    if file is not None:
        file._descriptor = None


def _open(path: Path) -> tuple[_Descriptor, os.stat_result]:
    try:
        try:
            descriptor = _Descriptor(os.open(path, _FLAGS))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with _LOCK:  # others need them more
                while _HOLDING:
                    _give_up_oldest()
            descriptor = _Descriptor(os.open(path, _FLAGS))
        status = os.fstat(descriptor.number)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of an unknown kind")
        raise FormatError(f"{path}: it is {kind}, expected a file")
    return descriptor, status


def _settled(descriptor: int, found: os.stat_result) -> os.stat_result:
    """The file's status, at a time when writing to it again would change that."""
    left = TICK - (time.time() - max(found.st_mtime, found.st_ctime))
    if 0 < left <= TICK:
        time.sleep(left)
        found = os.fstat(descriptor)
    return found


def _fill(descriptor: int, room: memoryview, start: int) -> None:
    """Fill ``room`` from byte ``start`` on; EOFError when the file ends before."""
    done = 0
    while done < len(room):
        count = _read_into(descriptor, room[done:], start + done)
        if count == 0:
            raise EOFError
        done += count


def _read(descriptor: int, start: int, size: int) -> bytes:
    """Bytes, all of them; EOFError when the file ends before."""
    found = os.pread(descriptor, size, start) if hasattr(os, "pread") else b""
    if len(found) == size:
        return found
    room = bytearray(size)
    _fill(descriptor, memoryview(room), start)
    return bytes(room)


if hasattr(os, "preadv"):

    def _read_into(descriptor: int, room: memoryview, start: int) -> int:
        return os.preadv(descriptor, [room], start)

else:  # Windows: the place to read from belongs to the descriptor, so one reads at a time

    def _read_into(descriptor: int, room: memoryview, start: int) -> int:
        with _LOCK:
            os.lseek(descriptor, start, os.SEEK_SET)
            part = os.read(descriptor, min(len(room), _CHUNK))
        room[: len(part)] = part
        return len(part)
