"""LargeFile: a new file of gigabytes, written from front to back, on its way to the disk while it is written.

A system keeps what is written in its memory and begins late to put it on the disk. For a file larger than that memory
it is the memory that takes the time: pages are looked for, and others pushed out that somebody would have read again.
So each part is handed to the disk at once and let go of when it is there.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

#: Bytes that are handed to the disk at once: some, and few enough that it begins early.
PART = 1 << 25
#: Linux begins to write what it is told not to keep; elsewhere nothing is said.
_ADVISE = getattr(os, "posix_fadvise", None)


class LargeFile:
    """A file that is written once, part after part. What it holds is on the disk only after an ``fsync``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._at = self._told = 0

    def write(self, data: Any) -> None:
        """Add bytes, of an array too, at the end."""
        rest = memoryview(data).cast("B")
        while rest:  # a system may take a part of it, of two gigabytes above all
            count = self._file.write(rest)
            self._at += count
            rest = rest[count:]
        if self._at - self._told >= PART:
            self._tell()

    def _tell(self) -> None:
        if _ADVISE is not None:
            # The part before is on the disk by now, and is let go of; this one is begun with.
            start = max(0, self._told - PART)
            _ADVISE(self._file.fileno(), start, self._at - start, os.POSIX_FADV_DONTNEED)
        self._told = self._at

    def __enter__(self) -> LargeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
