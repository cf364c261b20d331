"""A GGUF model in several files, as llama-gguf-split makes them: ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from pathlib import Path

from lorastack.errors import FormatError, Problems
from lorastack.formats.gguf import open_reader
from lorastack.formats.gguf_header import Header

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
#: Keys that only a part has.
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
#: llama.cpp numbers them with 16 bits; nobody makes more files than this of one model.
_MOST = 4096


def split_name(stem: str, number: int, count: int) -> str:
    """The name of one part, counted from 0.

    >>> split_name("big", 0, 3)
    'big-00001-of-00003.gguf'
    """
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def split_stem(name: str) -> str:
    """What the names of all parts begin with; of a file by itself, its name without the ending.

    >>> split_stem("big-00002-of-00003.gguf"), split_stem("small.gguf")
    ('big', 'small')
    """
    match = _SPLIT.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def open_parts(path: Path, max_elements: int) -> list[Header]:
    """The headers of all files of the model that ``path`` is, or is a part of.

    Raises
    ------
    FormatError
        Listing every part that is missing, damaged, or of another model.
    """
    first = open_reader(path, max_elements)
    count = first.fields["split.count"].value if "split.count" in first.fields else 1
    if count in (0, 1):
        return [first]
    match = _SPLIT.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= _MOST or not match or int(match["count"]) != count:
        raise FormatError(
            f"{path}: it says that it is one of {count} files, which are named NAME-00001-of-{count:05}.gguf and so "
            "on; give it its name, or join the files with llama-gguf-split"
        )
    problems = Problems(f"cannot read {match['stem']}.gguf in {count} files")
    parts: list[Header] = []
    for number in range(count):
        at = path.with_name(split_name(match["stem"], number, count))
        try:
            part = open_reader(at, max_elements)
        except FormatError as error:
            problems.add(error)
            continue
        said = [part.fields[key].value if key in part.fields else None for key in SPLIT_KEYS[:2]]
        if said != [number, count]:
            problems.add(f"{at}: it says that it is part {said[0]} of {said[1]}, counted from 0; fetch it again")
        parts.append(part)
    names = [tensor.name for part in parts for tensor in part.tensors]
    wanted = first.fields[SPLIT_KEYS[2]].value if SPLIT_KEYS[2] in first.fields else len(names)
    if not problems and (len(set(names)) != len(names) or len(names) != wanted):
        problems.add(f"they hold {len(names)} tensors, {len(set(names))} by name, expected {wanted}; fetch them again")
    problems.raise_any(FormatError)
    return parts
