"""Output files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorastack.errors import ArgumentError, LoraStackError
from lorastack.ways import FORCE, ways


class OutputError(LoraStackError, OSError):
    """The output could not be written; what was there before is unchanged."""


@contextlib.contextmanager
def whole_output(target: str | Path, force: bool = False, folder: bool = False) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to (a folder, if asked); moved to ``target`` at the end.

    When the body raises, or the disk is full, nothing is left and ``target`` is what it was before.

    Raises
    ------
    ArgumentError
        When ``target`` exists and ``force`` is not set, or its folder does not exist.
    OutputError
        When the system refuses to write.
    """
    target = Path(target)
    check_output(target, force)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target}: cannot write here: {error.strerror or error}") from error
    try:
        inside = scratch / target.name
        if folder:
            inside.mkdir()
        yield inside
        _sync(inside)
        _move(inside, target, scratch)
    except OSError as error:
        if isinstance(error, LoraStackError):
            raise
        raise OutputError(f"{target}: could not be written, nothing was changed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output(target: Path, force: bool) -> None:
    """Refuse an output that exists (without ``force``) or whose folder does not."""
    if not target.parent.is_dir():
        raise ArgumentError(f"{target}: the folder {target.parent} does not exist; create it first")
    if not force and (target.exists() or target.is_symlink()):
        raise ArgumentError(f"{target} exists{ways('choose another name', FORCE)}")


def _sync(path: Path) -> None:
    # Without this a crash after the move could leave a file of the right name and no content.
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _move(source: Path, target: Path, scratch: Path) -> None:
    old = scratch / "old"
    # A folder cannot be moved over another, and a file not over a folder: the old one steps aside first.
    aside = target.is_dir() and not target.is_symlink()
    if aside or (source.is_dir() and os.path.lexists(target)):
        os.replace(target, old)
        aside = True
    try:
        os.replace(source, target)
    except OSError:
        if aside:
            os.replace(old, target)
        raise
