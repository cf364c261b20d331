"""Input files: regular ones, of a bounded size; what the system says against them becomes an error of ours."""

from __future__ import annotations

import contextlib
import os
import stat
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from lorastack.errors import FormatError, LoraStackError, did_you_mean, shown

#: Of folders that are looked through.
MAX_ENTRIES = 20_000
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link that leads nowhere",
}


def kind_of(mode: int) -> str:
    """What kind of file it is, in words, by its ``st_mode``."""
    return _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")


def status_of(path: Path, error: type[LoraStackError] = FormatError) -> os.stat_result | None:
    """What the system says of the file that ``path`` leads to; None where there is nothing.

    Unlike ``Path.exists``, a name that no file can have, or a folder that may not be looked into, is an error of ours.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{shown(str(path))}: it cannot be looked at: {reason(problem)}") from problem


def looked_into(path: Path, error: type[LoraStackError] = FormatError) -> Path:
    """``path``; where it is a folder, one whose files may be listed and looked at."""
    # Asked, since opening it takes a descriptor; a file need not be one that can be run.
    if not os.access(path, os.R_OK | os.X_OK) and path.is_dir():
        raise error(f"{path}: it cannot be looked into: Permission denied")
    return path


def local(given: str) -> Path:
    """The path that a word names, its ``~`` spelt out where there is such a user."""
    try:
        return Path(given).expanduser()
    except (RuntimeError, ValueError):  # no such user, or no text that could name one
        return Path(given)


def present(path: Path) -> bool:
    """Whether something is there; not where a name could be none, or may not be looked at."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def nearest(path: Path) -> str:
    """The end of a message about a path that is not there: what lies beside its place under a name like its own."""
    try:
        with os.scandir(path.parent) as entries:
            there = [entry.name for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
    except (OSError, ValueError):
        return ""
    stems: dict[str, list[str]] = {}
    for name in there:
        stems.setdefault(Path(name).stem, []).append(name)
    near = get_close_matches(path.stem[:200], stems, n=3)  # an ending that many have says nothing
    where = "" if path.parent == Path() else os.path.join(path.parent, "")
    return did_you_mean(path.name, [name for stem in near for name in stems[stem]], where, cutoff=0.0)


def open_regular(path: Path, error: type[LoraStackError] = FormatError) -> BinaryIO:
    """Open for reading what is a regular file, or leads to one.

    A pipe would be waited for, and a device may have no end; opening some devices does something by itself.
    """
    found = status_of(path, error)
    if found is None:
        raise error(f"{path}: there is no such file")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: it is {kind_of(found.st_mode)}, expected a file")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # another one was put there meanwhile
                raise error(f"{path}: it is no regular file any more")
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as problem:
        if isinstance(problem, LoraStackError):
            raise
        raise error(f"{path}: it cannot be read: {reason(problem)}") from problem


def read_regular(path: Path, most: int, error: type[LoraStackError] = FormatError) -> bytes:
    """The content of a regular file of at most ``most`` bytes; of a larger one, no more is read."""
    with open_regular(path, error) as file:
        try:
            # A file of a terabyte of nothing takes no room on the disk, and all of the memory.
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""
        except OSError as problem:
            raise error(f"{path}: it cannot be read: {reason(problem)}") from problem
    if size > most or len(content) > most:
        raise error(f"{path}: it has {max(size, len(content)):,} bytes, at most {most:,} are read")
    return content


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a regular file."""
    with open_regular(path) as file:
        try:
            return file.read(count)
        except OSError as problem:
            raise FormatError(f"{path}: it cannot be read: {reason(problem)}") from problem


def below(folder: Path, depth: int) -> list[Path]:
    """The regular files in a folder, and ``depth - 1`` folders down; links are not followed down, and not all is seen.

    A folder may be the whole disk; what may not be looked into, or goes away meanwhile, is passed over.
    """
    found: list[Path] = []
    level, seen = [folder], 0
    for _ in range(depth):
        deeper: list[Path] = []
        for place in level:
            with contextlib.suppress(OSError), os.scandir(place) as entries:
                for entry in entries:
                    if (seen := seen + 1) > MAX_ENTRIES:
                        return found
                    if entry.is_file():
                        found.append(Path(entry.path))
                    elif entry.is_dir(follow_symlinks=False):
                        deeper.append(Path(entry.path))
        level = deeper
    return found


def reason(problem: BaseException) -> str:
    """What the system says, without the path, which the message has already."""
    return (getattr(problem, "strerror", None) or str(problem) or type(problem).__name__).rstrip(".")


def bytes_in_words(size: int) -> str:
    """A size as people read it.

    >>> bytes_in_words(1300000), bytes_in_words(12)
    ('1.2 MiB', '12 bytes')
    """
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
