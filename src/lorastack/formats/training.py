"""What the header of an image adapter says of its training: kohya's ``ss_`` fields and ``modelspec.``."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from lorastack.core.adapter import LoadedLora
from lorastack.formats.kohya import FORMAT_KEY
from lorastack.formats.limits import parsed_size_problem
from lorastack.formats.opened import OpenedFile

#: Bytes of a table of tags: a tag and its count are some 30.
_MOST = 1 << 24
#: Tags that are told, and words for each folder of images.
_TAGS, _WORDS = 50, 3
#: Letters of a text out of a header.
_LETTERS = 300
_STEP = 1 << 20


@dataclass(frozen=True)
class Training:
    """What a file says of itself; a field is empty where it says nothing.

    ``trigger_words`` are those that the file names, or the folders' names and the tags of most images of each.
    """

    base_model: str = ""
    title: str = ""
    resolution: str = ""
    network: str = ""
    dim: str = ""
    alpha: str = ""
    trigger_words: tuple[str, ...] = ()
    #: (tag, number of images), the commonest first.
    tags: tuple[tuple[str, int], ...] = ()
    odd: tuple[str, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return self != Training()


def training_of(metadata: Mapping[str, Any]) -> Training:
    """What a header's metadata says of training.

    >>> said = {"ss_tag_frequency": '{"10_zara": {"zara": 9, "red hat": 2}}', "ss_network_dim": "8"}
    >>> training_of(said).trigger_words, training_of(said).tags, training_of(said).dim
    (('zara',), (('zara', 9), ('red hat', 2)), '8')
    """
    folders, odd = _tags(metadata)
    tags = sum(folders.values(), Counter[str]())
    phrase = _text(metadata, "modelspec.trigger_phrase")
    words = [phrase] if phrase else [word for name, counts in folders.items() for word in _words(name, counts)]
    return Training(
        base_model=_text(metadata, "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"),
        title=_text(metadata, "modelspec.title", "ss_output_name"),
        resolution=_text(metadata, "modelspec.resolution", "ss_resolution"),
        network=_text(metadata, "ss_network_module"),
        dim=_text(metadata, "ss_network_dim"),
        alpha=_text(metadata, "ss_network_alpha"),
        trigger_words=tuple(dict.fromkeys(words))[:_TAGS],
        tags=tuple(tags.most_common(_TAGS)),
        odd=tuple(odd),
    )


def _text(metadata: Mapping[str, Any], *keys: str) -> str:
    """The first of the fields that says something."""
    found = (metadata.get(key) for key in keys)
    return next((text[:_LETTERS] for text in found if isinstance(text, str) and text not in ("", "None")), "")


def _tags(metadata: Mapping[str, Any]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Folder of images -> how many of them have each tag; and what is odd about the table."""
    text = metadata.get("ss_tag_frequency")
    if not isinstance(text, str):
        return {}, []
    raw = text.encode(errors="replace")
    if len(raw) > _MOST or parsed_size_problem(raw, len(raw)):
        return {}, [f"ss_tag_frequency has {len(raw)} bytes, which is more than is read"]
    try:
        said = orjson.loads(raw)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return {}, ["ss_tag_frequency is no JSON object"]
    found = {}
    for folder, counts in said.items():
        if isinstance(counts, dict):
            found[folder] = Counter({tag.strip(): n for tag, n in counts.items() if type(n) is int and 0 < n < 1 << 53})
    return found, []


def _words(folder: str, counts: Counter[str]) -> list[str]:
    """A folder's name without kohya's number of repeats, where it is a tag; else the tags of the most images."""
    name = re.sub(r"^\d+_", "", folder).strip()
    if name in counts:
        return [name]
    most = max(counts.values(), default=0)
    return [tag for tag, n in counts.most_common(_WORDS) if n == most]


def short_hashes(lora: LoadedLora) -> dict[str, str]:
    """The hashes that people look an image adapter up by; empty for any other.

    AutoV2 is of the whole file (ten digits), AutoV3 of what is behind the header (twelve), of SHA-256 each.
    """
    files = [file for file in lora.opened if isinstance(file, OpenedFile) and file.path.suffix == ".safetensors"]
    if len(files) != 1 or lora.metadata.get(FORMAT_KEY) not in ("kohya", "ComfyUI", "diffusers"):
        return {}
    (file,) = files
    start = 8 + int.from_bytes(file.read(0, 8), "little")
    behind = hashlib.sha256()
    for first in range(start, file.size, _STEP):
        behind.update(file.read(first, min(_STEP, file.size - first)))
    return {"AutoV2": file.sha256()[:10], "AutoV3": behind.hexdigest()[:12]}
