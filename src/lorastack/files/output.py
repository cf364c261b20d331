"""Output that appears whole or not at all, and replaces only what it may."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorastack.errors import ArgumentError, LoraStackError, shown
from lorastack.files.moves import move_new, swap
from lorastack.files.partials import Partial, partial_beside, sweep
from lorastack.files.regular import (
    MAX_ENTRIES,
    bytes_in_words,
    kind_of,
    local,
    looked_into,
    read_regular,
    reason,
    status_of,
)
from lorastack.files.signed import CARD, FIGURES, is_signed
from lorastack.ways import FORCE, ways

#: What was replaced is said here, at the level INFO; the command shows it.
LOG = logging.getLogger("lorastack.files")
#: The files of a folder that holds an adapter and nothing else.
ADAPTER_FILES = frozenset(
    "adapter_config.json adapter_model.safetensors adapter_model.bin adapters.safetensors "
    "pytorch_lora_weights.safetensors".split()
)
#: One of which a whole one has.
_WHOLE = ("adapter_config.json", "pytorch_lora_weights.safetensors")
#: In a folder that a merge wrote: how it was made, with the names of all files that are its own.
MERGE_RECIPE = "lorastack_merge.toml"
#: Bytes of such a recipe.
_MOST = 1 << 24
#: Folders in which a name is a device, or a process's own.
_NO_PLACE = ("/dev", "/dev/fd", "/proc", "/sys")

Sources = Iterable[str | Path]


class OutputError(LoraStackError, OSError):
    """The output could not be written; what was there before is unchanged."""


@contextlib.contextmanager
def whole_output(
    target: str | Path, force: bool = False, folder: bool = False, sources: Sources = ()
) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to (a folder, if asked); moved to ``target`` at the end.

    When the body raises, the disk is full, or the process is told to end, nothing is left and ``target`` is what it was
    before; what a killed process left, the next one that writes there removes.

    Raises
    ------
    ArgumentError
        When ``target`` exists and ``force`` is not set, or it is nothing that ``force`` replaces; also when it appears
        only while the body runs.
    OutputError
        When the system refuses to write.
    """
    target, sources = Path(target), list(sources)
    check_output(target, force, sources)
    try:
        with partial_beside(target) as partial:
            if folder:
                partial.new.mkdir()
            yield partial.new
            _sync(partial.new)
            _move(partial, target, force, sources)
    except OSError as error:
        if isinstance(error, LoraStackError):
            raise
        raise OutputError(f"{target}: could not be written, nothing was changed: {reason(error)}") from error


def check_output(target: Path, force: bool, sources: Sources = ()) -> None:
    """Refuse an output that exists (without ``force``) or may not be replaced, or whose folder does not exist.

    ``force`` replaces a file, or a folder that holds an adapter, or what a merge wrote, and nothing else but texts that
    we wrote and nobody changed; never one of ``sources``.
    """
    folder = status_of(target.parent, ArgumentError)
    if folder is None or not stat.S_ISDIR(folder.st_mode):
        raise ArgumentError(f"{target}: the folder {target.parent} does not exist; create it first")
    sweep(target.parent)
    _there(target, force, sources)


def check_apart(target: Path, models: Sources, what: str = "the base") -> None:
    """Refuse an output where one of the models lies, be it through links."""
    place = Path(os.path.realpath(target.parent)) / target.name
    for model in models:
        there = Path(os.path.realpath(model))
        if place == there or there in place.parents or Path(os.path.realpath(target)) == there:
            raise ArgumentError(f"{target} is in {model}, {what}, which is never changed; choose another place")


def _there(target: Path, force: bool, sources: Sources) -> os.stat_result | None:
    """What is at ``target`` and may be replaced; None where nothing is."""
    try:
        found = target.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{shown(str(target))}: it cannot be written: {reason(error)}") from error
    if not force:
        raise ArgumentError(f"{target} exists{ways('choose another name', FORCE)}")
    if why := _irreplaceable(target, found):
        raise ArgumentError(f"{target} {why}, and is not replaced; choose another name")
    if source := _source_of(target, sources):
        raise ArgumentError(f"{target} is not replaced: {source} is made use of; choose another name")
    return found


def _irreplaceable(target: Path, found: os.stat_result) -> str | None:
    """Why it is nothing to replace."""
    if os.path.realpath(target.parent) in _NO_PLACE or os.path.realpath(target.parent).startswith(("/proc/", "/sys/")):
        return "is no place for files"
    if stat.S_ISDIR(found.st_mode):
        looked_into(target, ArgumentError)
        with os.scandir(target) as entries:
            files = {entry.name: entry.is_file() for entry in entries}
        ours = {name for name, is_file in files.items() if is_file and _is_ours(target / name)}
        others = sorted(set(files) - ours - {FIGURES}) + (_foreign_figures(target) if FIGURES in files else [])
        if MERGE_RECIPE in files and not (others := _foreign_to_merge(target)):
            return None
        if others:
            return f"holds more than an adapter ({', '.join(map(shown, others[:3]))}{', ...' if others[3:] else ''})"
        whole = ours.isdisjoint(ADAPTER_FILES) or not ours.isdisjoint(_WHOLE)
        return None if whole else "holds no whole adapter"
    led_to = status_of(target, ArgumentError) if stat.S_ISLNK(found.st_mode) else found
    if led_to is not None and not stat.S_ISREG(led_to.st_mode) and not stat.S_ISDIR(led_to.st_mode):
        return f"is {kind_of(led_to.st_mode)}"
    return None


def _is_ours(path: Path) -> bool:
    """Whether a file in a folder is an adapter's own, or a text that we wrote."""
    return path.name in ADAPTER_FILES or is_signed(path)


def _foreign_figures(folder: Path) -> list[str]:
    """What in the folder of a card's pictures is none that we wrote; the folder itself where it is no folder."""
    place = folder / FIGURES
    if place.is_symlink() or not place.is_dir():
        return [FIGURES]
    looked_into(place, ArgumentError)
    found = [at for at in place.iterdir() if at.is_symlink() or not at.is_file() or not is_signed(at)]
    return sorted(f"{FIGURES}/{at.name}" for at in found)


def _foreign_to_merge(folder: Path) -> list[str]:
    """The files in a folder that a merge wrote which it does not name as its own, or its card with others' words."""
    try:
        said = tomllib.loads(read_regular(folder / MERGE_RECIPE, _MOST, ArgumentError).decode())
        own = set(said["lorastack"]["files"])
        if (folder / CARD).exists() and not is_signed(folder / CARD):
            own.discard(CARD)
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
        return sorted(set(there[:MAX_ENTRIES]) - own) or (["and more"] if len(there) > MAX_ENTRIES else [])
    except (ValueError, KeyError, TypeError, LoraStackError):
        return [MERGE_RECIPE]


def _source_of(target: Path, sources: Sources) -> str | Path | None:
    """The source that would be lost with ``target``: it, one in it or around it, be it through links."""
    resolved, inodes = target.resolve(), _inodes(target)
    for source in sources:
        path = local(str(source))
        try:
            if not path.exists():  # a hub id, or one in memory
                continue
            there = path.resolve()
            if resolved == there or resolved in there.parents or there in resolved.parents or inodes & _inodes(path):
                return source
        except (OSError, ValueError, RuntimeError):
            continue
    return None


def _inodes(path: Path) -> set[tuple[int, int]]:
    """The file, or the folder and the files in it, as the disk knows them by whatever name."""
    inside = [path / name for name in ADAPTER_FILES] if path.is_dir() else []
    found = [at.stat() for at in (path, *inside) if at.exists()]
    return {(one.st_dev, one.st_ino) for one in found if one.st_ino}


def _sync(path: Path) -> None:
    # Without this a crash after the move could leave a file of the right name and no content.
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _move(partial: Partial, target: Path, force: bool, sources: Sources) -> None:
    for _ in range(10):
        # It may have changed while the output was made.
        old = _there(target, force, sources)
        if old is not None:
            words = f"{target} ({bytes_in_words(_size(target))})"
            _replace(partial, target, old)
            LOG.info("replaced %s", words)
            return
        with contextlib.suppress(FileExistsError):  # put there between the look and the move
            move_new(partial.new, target)
            return
    raise OutputError(f"{target}: others write there all the time; nothing was changed")


def _replace(partial: Partial, target: Path, old: os.stat_result) -> None:
    new = partial.new
    _keep_modes(target, new)
    if not new.is_dir() and not stat.S_ISDIR(old.st_mode):
        os.replace(new, target)
        return
    if swap(new, target):
        return
    # Here the old one steps aside first. Whoever sweeps puts it back if this process ends between the two moves.
    partial.old.parent.mkdir()
    os.replace(target, partial.old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(partial.old, target)
        raise


def _keep_modes(old: Path, new: Path) -> None:
    """What only its owner could read stays so."""
    pairs = [(old, new)]
    if new.is_dir():
        names = (*ADAPTER_FILES, CARD, FIGURES, *(f"{FIGURES}/{at.name}" for at in (new / FIGURES).glob("*")))
        pairs += [(old / name, new / name) for name in names]
    for before, after in pairs:
        if after.exists() and before.exists() and not before.is_symlink() and before.is_dir() == after.is_dir():
            after.chmod(before.stat().st_mode & 0o777)


def _size(path: Path) -> int:
    inside = [at for at in path.iterdir() if at.is_file()] if path.is_dir() and not path.is_symlink() else [path]
    return sum(at.lstat().st_size for at in inside)
