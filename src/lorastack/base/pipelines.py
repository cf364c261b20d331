"""Image models as a base: a folder of diffusers, and one file with all models of Stable Diffusion or with one of any.

The names are those of the live pipeline (`parts.py`); they point at the files' own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorastack.base.checkpoint import OriginalNames, is_original
from lorastack.base.model import BaseModel, Part, Stored
from lorastack.base.parts import part_of
from lorastack.errors import FormatError, Problems, UnsupportedError, shown
from lorastack.files import below, present
from lorastack.formats.json_object import read_object
from lorastack.formats.safetensors_file import FLOATS, SafetensorsFile

#: What a pipeline's folder says of its parts.
MODEL_INDEX = "model_index.json"
#: Names by which models without a front are known for diffusers' own.
_DIFFUSERS = ("down_blocks.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.", "encoder.down_blocks.")
#: The same of those who made a model, whose names are not read.
_OTHERS = {"double_blocks.": "Flux", "joint_blocks.": "Stable Diffusion 3"}
#: Classes of a pipeline that are no models.
_NO_MODEL = re.compile(r"(Tokenizer|Scheduler|Processor|Extractor)(Fast)?$")
_FOLDER = "give the model as a folder of diffusers"


def open_pipeline(folder: Path, given: str, open_part: Callable[[Path, str], BaseModel]) -> BaseModel:
    """A folder with a model_index.json; ``open_part`` opens the folder of one model.

    Raises
    ------
    FormatError
        When it is damaged, or the folder of a model is not there.
    """
    index = read_object(folder / MODEL_INDEX)
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, Stored] = {}
    tied: dict[str, str] = {}
    config: dict[str, Any] = dict(index)
    parts, problems = [], Problems(f"base {given}: its {MODEL_INDEX} and its folders differ")
    for name, said in index.items():
        if name.startswith("_") or not isinstance(said, list) or len(said) != 2 or said[0] is None:
            continue
        where = folder / name
        if _NO_MODEL.search(str(said[-1])) and not present(where):
            continue  # of a hub id only what a base needs is fetched
        if not name.isidentifier() or not present(where):
            problems.add(f"{shown(name)} is {shown(said)}, and has no folder; fetch it whole")
            continue
        if not present(where / "config.json") or not _has_weights(where):
            continue  # no model: a scheduler, a tokenizer; or one in another format, which stays as it is
        part = open_part(where, f"{given}/{name}")
        parts.append(name)
        shapes |= {f"{name}.{key}": shape for key, shape in part.shapes.items()}
        stored |= {f"{name}.{key}": place for key, place in part.stored.items()}
        tied |= {f"{name}.{key}": f"{name}.{of}" for key, of in part.tied.items()}
        if part.quantised:
            config.setdefault("quantization_config", part.config["quantization_config"])
    problems.raise_any(FormatError)
    if not parts:
        raise FormatError(f"base {given}: no model of its {MODEL_INDEX} has .safetensors files; convert it")
    architecture = index.get("_class_name")
    return BaseModel(
        given,
        "hf",
        architecture if isinstance(architecture, str) else None,
        config,
        shapes,
        stored,
        tied=tied,
        parts=tuple(parts),
    )


def open_single_file(path: Path, given: str) -> BaseModel:
    """One file: a checkpoint with the original names of Stable Diffusion, or a model with diffusers' names.

    Raises
    ------
    FormatError
        When it is neither.
    UnsupportedError
        When it has original names that are not read.
    """
    file = SafetensorsFile(path)
    if any(".lora_" in key or key.startswith("lora_") for key in file.tensors):
        raise FormatError(f"base {given}: it is an adapter, give the model it was trained on")
    if is_original(file.tensors):
        return _original(file, given)
    shapes = {key: info[1] for key, info in file.tensors.items()}
    stored = {key: Stored((path,), partial(floats, file, key, given), (Part(file, key),)) for key in shapes}
    fronts = dict.fromkeys(part_of(key) for key in shapes)
    parts = () if None in fronts else tuple(part for part in fronts if part)
    if not parts and not any(key.startswith(_DIFFUSERS) for key in shapes):
        whose = next((what for front, what in _OTHERS.items() if any(front in key for key in shapes)), None)
        if whose:
            raise UnsupportedError(f"base {given}: it has the original names of {whose}, which are not read; {_FOLDER}")
        raise FormatError(
            f"base {given}: its tensors, such as {shown(next(iter(shapes), ''))}, are neither a Stable Diffusion "
            f"checkpoint's nor a diffusers model's; {_FOLDER}, or a language model as its folder"
        )
    return BaseModel(given, "hf", None, {}, shapes, stored, parts=parts, single_file=True)


def _original(file: SafetensorsFile, given: str) -> BaseModel:
    names = OriginalNames(file.tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, Stored] = {}
    problems = Problems(f"base {given} is damaged")
    for key, (kind, shape, *_) in file.tensors.items():
        if kind not in FLOATS:
            continue
        for name, third, turned in names.pieces(key):
            if name in shapes:
                problems.add(f"tensors {key} and another are both {name}")
                break
            part, own = Part(file, key), shape
            read: Callable[[], np.ndarray] = partial(floats, file, key, given)
            if third is not None:
                if not shape or shape[0] % 3:
                    problems.add(f"tensor {key} is {list(shape)}, expected q, k and v side by side")
                    break
                rows = shape[0] // 3
                own, span = (rows, *shape[1:]), (third * rows, (third + 1) * rows)
                part = Part(file, key, span)
                read = partial(_some, read, *span)
            if turned:  # no tensor of the file as it is: it can be read, and not merged into
                shapes[name], stored[name] = shape[::-1], Stored((file.path,), partial(_turned, read))
                continue
            if name.startswith("vae.") and own[2:] == (1, 1) and ".attentions." in name:
                own = own[:2]  # a convolution of one pixel in the first code, and a linear layer in diffusers
                read = partial(_shaped, read, own)
            shapes[name], stored[name] = own, Stored((file.path,), read, (part,))
    problems.raise_any(FormatError)
    parts = tuple(dict.fromkeys(name.partition(".")[0] for name in shapes))
    architecture = "StableDiffusionXLPipeline" if names.is_xl else "StableDiffusionPipeline"
    return BaseModel(given, "hf", architecture, {}, shapes, stored, parts=parts, single_file=True)


def floats(file: SafetensorsFile, name: str, given: str) -> np.ndarray:
    """A tensor's numbers in float32, or float64 where the file has that."""
    stored = file.tensors[name][0]
    if stored not in FLOATS:
        raise UnsupportedError(f"base {given}: tensor {name} is {stored}, no floating-point weight")
    array = file.factor(name, allow_nonfinite=True).take()
    return array if stored == "F64" else array.astype(np.float32)


def _some(read: Callable[[], np.ndarray], first: int, stop: int) -> np.ndarray:
    return read()[first:stop]


def _shaped(read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return read().reshape(shape)


def _turned(read: Callable[[], np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(read().T)


def _has_weights(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" for path in below(folder, 1))
