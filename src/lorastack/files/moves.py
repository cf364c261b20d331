"""Moves that ``os`` does not have: one that never replaces, and one that swaps, each with a way where it is lacking."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
#: What a system or a file system says that does not know the flag.
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def move_new(source: Path, target: Path) -> None:
    """Move to where nothing is; FileExistsError where something is, were it put there this moment."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if not source.is_dir():
        try:
            os.link(source, target)  # which never replaces
        except FileExistsError:
            raise
        except OSError:  # no hard links here either: what is left is to look first
            pass
        else:
            source.unlink()
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def swap(one: Path, other: Path) -> bool:
    """Exchange two files or folders in one step; False where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    function = _function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _function() -> Any:
    """renameat2 of the C library (Linux; glibc 2.28, musl 1.2.6); None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
