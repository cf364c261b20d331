"""Weights in several files, with an index that says which tensor is in which."""

from __future__ import annotations

import re
from pathlib import Path

from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, shown
from lorastack.files import present
from lorastack.formats.json_object import read_object
from lorastack.formats.opened import OpenedFile
from lorastack.formats.safetensors_file import Info
from lorastack.formats.tensors import open_tensors

#: transformers names the parts of one file so.
_SHARD = re.compile(r"(?P<name>.+)-(?P<part>\d+)-of-(?P<count>\d+)(?P<ending>\.\w+)")
INDEX_ENDING = ".index.json"


class Shards:
    """Every tensor of every shard, with the same face as one file.

    Raises
    ------
    FormatError
        Listing every shard that is missing or not what the index says; part of an adapter is none.
    """

    def __init__(self, file: Path | OpenedFile) -> None:
        file = OpenedFile.of(file)
        self.path = index = file.path
        wanted = _weight_map(file)
        problems = Problems(f"cannot read {index}")
        names = sorted(set(wanted.values()))
        missing = [name for name in names if not present(index.parent / name)]
        for name in missing:
            problems.add(f"{name} is not there; fetch the folder whole")
        opened = {name: open_tensors(index.parent / name) for name in names if name not in missing}
        for name, shard in opened.items():
            has, should = set(shard.tensors), {tensor for tensor, file in wanted.items() if file == name}
            for what, odd in (("lacks", should - has), ("has, without a word in the index,", has - should)):
                if odd:
                    problems.add(f"{name} {what} {len(odd)} tensors such as {min(odd)}; fetch or save it again")
        problems.raise_any(FormatError)
        self.files = (file, *(part for shard in opened.values() for part in shard.files))
        self.notes = tuple(dict.fromkeys(note for shard in opened.values() for note in shard.notes))
        self.metadata = {key: value for shard in opened.values() for key, value in shard.metadata.items()}
        self._holder = {tensor: opened[name] for tensor, name in wanted.items()}
        self.tensors: dict[str, Info] = {tensor: shard.tensors[tensor] for tensor, shard in self._holder.items()}

    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor:
        return self._holder[name].factor(name, allow_nonfinite)


def _weight_map(index: OpenedFile) -> dict[str, str]:
    """Tensor -> name of its shard, which lies beside the index."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise FormatError(
            f"{index}: weight_map is {shown(found)}, expected tensor names with file names; fetch it again"
        )
    outside = sorted({name for name in found.values() if not name or re.search(r"[/\\:\0]|^\.+$", name)})
    if outside:
        raise FormatError(
            f"{index}: it names files outside its folder; a shard lies beside the index", [shown(n) for n in outside]
        )
    return found


def refuse_part(path: Path) -> None:
    """Raise when the file is by its name one shard of several: it would load as half an adapter."""
    match = _SHARD.fullmatch(path.name)
    if match and int(match["count"]) > 1:
        index = f"{match['name']}{match['ending']}{INDEX_ENDING}"
        there = (path.parent / index).is_file()
        raise FormatError(
            f"{path}: it is part {int(match['part'])} of {int(match['count'])} of an adapter, not the whole; "
            + (f"give the folder {path.parent}" if there else f"fetch all parts with {index} and give their folder")
        )


def parts_in(folder: Path) -> list[Path]:
    """The files of a folder that are shards by their names."""
    return sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
