"""Which files of a PEFT folder hold its weights."""

from __future__ import annotations

import os
from pathlib import Path

from lorastack.errors import FormatError
from lorastack.formats.opened import OpenedFile
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.shards import INDEX_ENDING, Shards, parts_in
from lorastack.formats.tensors import Tensors, open_tensors

WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
#: What a folder's weights are looked for under, the first that is there; each may be an index with shards instead.
#: The last two are whole models, as trainers save them: their LoRA part is read.
NAMES = (WEIGHTS, OLD_WEIGHTS, "model.safetensors", "pytorch_model.bin")

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def open_folder(folder: Path) -> Tensors:
    """The weights of the adapter in a folder."""
    if path := _usual(folder):
        return open_weights(OpenedFile(path))
    parts = parts_in(folder)
    if parts:
        raise FormatError(
            f"{folder}: it has shards such as {parts[0].name}, but no {WEIGHTS}{INDEX_ENDING} that says which belong "
            "together; fetch it whole"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _ENDINGS)
    raise FormatError(
        f"{folder}: it has {CONFIG_NAME}, but neither {WEIGHTS} nor {OLD_WEIGHTS}; fetch it whole"
        + (f", or give the file itself if its weights are in {' or '.join(others[:5])}" if others else "")
    )


def open_weights(file: OpenedFile) -> Tensors:
    """The weights in a file named by the caller: one file, or an index with its shards."""
    return Shards(file) if file.path.name.endswith(INDEX_ENDING) else open_tensors(file)


def stands_for_folder(path: Path) -> bool:
    """Whether a file is named as PEFT names those of an adapter's folder, and is read when the folder is given."""
    if path.name == CONFIG_NAME:
        return True
    return path.name.removesuffix(INDEX_ENDING) in (WEIGHTS, OLD_WEIGHTS) and _usual(path.parent) == path


def _usual(folder: Path) -> Path | None:
    """The file of weights, or the index of its shards, that is read when the folder is given."""
    start = os.path.join(folder, "")  # text: opening is often, and paths take as long as the question
    for name in [one + ending for one in NAMES for ending in ("", INDEX_ENDING)]:
        if os.path.isfile(start + name):
            return folder / name
    return None
