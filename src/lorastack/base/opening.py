"""Open a base: a folder or file of Hugging Face's, a GGUF file or a hub id; its headers are read, no weight is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorastack.base.live_view import live_view
from lorastack.base.model import BaseModel, Part, Stored
from lorastack.base.pipelines import MODEL_INDEX, floats, open_pipeline, open_single_file
from lorastack.errors import FormatError, Problems, UnsupportedError, shown
from lorastack.files import below, present, read_head
from lorastack.formats import MAX_VOCABULARY
from lorastack.formats.gguf_header import Tensor
from lorastack.formats.gguf_splits import open_parts, split_stem
from lorastack.formats.json_object import read_object
from lorastack.formats.safetensors_file import FLOATS, SafetensorsFile
from lorastack.formats.shards import INDEX_ENDING
from lorastack.hub import resolve

#: What the file of all weights is called, in transformers and in diffusers.
USUAL = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_BASE_FILES = ("config.json", "*/config.json", MODEL_INDEX, "*.safetensors", "*.safetensors.index.json", "*.gguf")


def open_base(path: str | Path) -> BaseModel:
    """The base in a Hugging Face folder, of diffusers or transformers, in a file, or under a hub id.

    A file is GGUF, or one .safetensors file of an image model: a checkpoint of Stable Diffusion, or one of diffusers.

    Raises
    ------
    FormatError
        When it is neither, or damaged.
    """
    given = str(path)
    where = resolve(given, patterns=_BASE_FILES)
    if where.is_dir() and present(where / MODEL_INDEX):
        return open_pipeline(where, given, _from_folder)
    if where.is_dir() and not present(where / "config.json"):
        files = sorted(path for path in below(where, 1) if path.suffix == ".gguf")
        if len({split_stem(path.name) for path in files}) != 1:
            raise FormatError(f"base {given}: it has no config.json and {len(files)} .gguf files; name one of them")
        where = files[0]
    if where.is_dir():
        return _from_folder(where, given)
    if read_head(where, 4) != b"GGUF" and where.suffix == ".safetensors":  # a pipe would be waited for
        return open_single_file(where, given)
    return _from_gguf(where, given)


def _from_gguf(path: Path, given: str) -> BaseModel:
    parts = open_parts(path, MAX_VOCABULARY)
    fields = {key: field for part in reversed(parts) for key, field in part.fields.items()}  # the first has them all
    config = {key: f.contents() for key, f in fields.items() if not key.startswith(("GGUF.", "tokenizer."))}
    if config.get("general.type") == "adapter":
        raise FormatError(f"base {given}: it is an adapter (general.type), give the model it was trained on")
    architecture = config.get("general.architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise FormatError(f"base {given}: key general.architecture is {shown(architecture)}, expected a name")
    shapes = {t.name: t.dims[::-1] for part in parts for t in part.tensors}
    stored = {
        t.name: Stored((part.path,), partial(_dequantised, t, given), (Part(part, t.name),))
        for part in parts
        for t in part.tensors
    }
    return BaseModel(given, "gguf", architecture, config, shapes, stored)


def _dequantised(tensor: Tensor, given: str) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # a base may hold NaN and Inf
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError, KeyError) as error:
        kind = tensor.tensor_type.name
        raise UnsupportedError(f"base {given}: tensor {tensor.name} of type {kind} cannot be read: {error}") from error
    return array.reshape(tensor.dims[::-1])


def _from_folder(folder: Path, given: str) -> BaseModel:
    config = read_object(folder / "config.json")
    _check_config(config, given)
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, Stored] = {}
    packed = bool(config.get("quantization_config"))
    for path in _weight_files(folder, given):
        file = SafetensorsFile(path)
        twice = next((name for name in file.tensors if name in stored), None)
        if twice:
            raise FormatError(
                f"base {given}: tensor {twice} is in {stored[twice].files[0].name} and in {path.name}; leave one "
                "variant of its weights in the folder"
            )
        for name, info in file.tensors.items():
            shapes[name] = () if packed and info[0] not in FLOATS else info[1]
            stored[name] = Stored((path,), partial(floats, file, name, given), (Part(file, name),))
    _check_index(folder, given, shapes)
    return live_view(given, config, shapes, stored)


def _check_config(config: Mapping[str, Any], given: str) -> None:
    """The fields that names depend on; the rest is looked at when it is used."""
    problems = Problems(f"base {given}: its config.json is damaged")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        problems.add(f"architectures is {shown(names)}, expected a list of names")
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        problems.add(f"text_config is {shown(text)}, expected fields with values")
    for where, said in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        kind = said.get("model_type")
        if kind is not None and not isinstance(kind, str):
            problems.add(f"{where}model_type is {shown(kind)}, expected a name")
    problems.raise_any(FormatError)


def _weight_files(folder: Path, given: str) -> list[Path]:
    """The files that hold the weights: those of the index, the one of the usual name, or all there are."""
    for usual in USUAL:
        index = folder / f"{usual}{INDEX_ENDING}"
        if present(index):
            names = sorted(set(_weight_map(index, given).values()))
            return [path for name in names if present(path := folder / Path(name).name) and path.is_file()]
        if (folder / usual).is_file():
            return [folder / usual]
    files = sorted(p for p in below(folder, 1) if p.suffix == ".safetensors")
    if not files:
        raise FormatError(f"base {given}: it has no .safetensors file; convert it to safetensors")
    return files


def _check_index(folder: Path, given: str, shapes: Mapping[str, Any]) -> None:
    for index in [path for usual in USUAL if present(path := folder / f"{usual}{INDEX_ENDING}")][:1]:
        problems = Problems(f"base {given} is incomplete")
        missing = sorted(set(_weight_map(index, given)) - set(shapes))
        if missing:
            problems.add(f"{len(missing)} weights of its index are in no file, such as {missing[0]}; fetch it whole")
        problems.raise_any(FormatError)


def _weight_map(index: Path, given: str) -> dict[str, str]:
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise FormatError(f"base {given}: its {index.name} has no weight_map of names with files; fetch it again")
    return found
