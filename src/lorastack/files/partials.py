"""The folder beside an output in which it is written, and what is done with those that dead processes left.

Its owner holds a lock on a file in it, which the system lets go of however the process ends. So whoever can take the
lock may remove the folder; an owner that lost it before it had the lock makes another.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorastack.files.moves import move_new

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]

_LOCK, _NEW, _OLD = "lorastack.lock", "new", "old"
_NAME = re.compile(r"\..*\.[a-z0-9_]{8}\.partial", re.DOTALL)
#: Of the output's name, so that a longer one is no name too long.
_STEM_BYTES = 100


class Partial:
    """A folder beside ``target`` that this process has for itself."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder = folder
        self.new = folder / _NEW / target.name
        self.old = folder / _OLD / target.name


@contextlib.contextmanager
def partial_beside(target: Path) -> Iterator[Partial]:
    """Yield a new one, and remove it in the end with what is in it."""
    folder, locks = _made(target)
    try:
        partial = Partial(folder, target)
        partial.new.parent.mkdir()
        yield partial
    finally:
        try:
            # Removing a folder takes descriptors, and the last ones may be what the body failed for.
            for spare in locks[1:]:
                os.close(spare)
        finally:  # a signal that ends the process may come right there
            _put_away(folder)
            for lock in locks[:1]:
                os.close(lock)


def _made(target: Path) -> tuple[Path, list[int]]:
    """A new folder, and descriptors of its lock, none where there are no locks."""
    stem = os.fsdecode(os.fsencode(target.name)[:_STEM_BYTES])
    while True:
        # The name comes first, so that a signal the moment the folder is there finds what to remove.
        folder = target.parent / f".{stem}.{secrets.token_hex(4)}.partial"
        try:
            folder.mkdir(0o700)
            lock = _locked(folder, create=True)
            if lock is None:
                return folder, []
            if lock != _TAKEN:
                return folder, [lock, *(os.dup(lock) for _ in range(4))]
        except FileExistsError:
            continue
        except FileNotFoundError:  # swept before it had its lock
            if not target.parent.exists():
                raise
        except BaseException:
            for path in (folder / _LOCK, folder):
                with contextlib.suppress(OSError):
                    path.unlink() if path.name == _LOCK else path.rmdir()
            raise


def sweep(folder: Path) -> None:
    """Remove what dead processes left in ``folder``; an old output that only lies in there goes back to its place."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name) and _is_ours(entry)]
        for partial in left:
            _sweep_one(partial)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    if fcntl is None or not entry.is_dir(follow_symlinks=False):
        return False
    return entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _sweep_one(partial: Path) -> None:
    try:
        lock = _locked(partial, create=False)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # no lock: just made, or some other program's
            partial.rmdir()
        return
    if lock is None or lock == _TAKEN:
        return
    try:
        _put_away(partial)
    finally:
        os.close(lock)


#: Another process has the lock.
_TAKEN = -1


def _locked(folder: Path, create: bool) -> int | None:
    """The descriptor of the folder's lock, held; `_TAKEN` where another has it, None where there are no locks."""
    if fcntl is None:
        return None
    path = folder / _LOCK
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return _TAKEN


def _put_away(folder: Path) -> None:
    """Remove the folder; a signal that ends the process does not end this."""
    try:
        _put_away_once(folder)
    except BaseException:
        _put_away_once(folder)
        raise


def _put_away_once(folder: Path) -> None:
    if not _settled(folder):
        return
    for inner in (_NEW, _OLD):
        shutil.rmtree(folder / inner, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _settled(folder: Path) -> bool:
    """Whether nothing is lost with the folder, once an old output that steps aside in it is back at its place."""
    aside = folder / _OLD
    for old in list(aside.iterdir()) if aside.is_dir() else []:
        there = folder.parent / old.name
        try:
            move_new(old, there)
        except FileExistsError:
            # The new one is there. Where that is here still, somebody else put something there: the old one is kept.
            if (folder / _NEW / old.name).exists():
                return False
        except OSError:
            return False
    return True
