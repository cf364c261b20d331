"""BaseModel: the names and shapes of a base's weights, read from its headers alone; a weight only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorastack.base.architectures import BY_HF, Architecture, architecture_of
from lorastack.core.delta import LoraDelta
from lorastack.core.target import Naming
from lorastack.errors import FormatError, Problems, ShapeError, UnknownNameError, UnsupportedError
from lorastack.formats.gguf import open_reader
from lorastack.formats.json_object import read_object
from lorastack.formats.safetensors_file import FLOATS, SafetensorsFile
from lorastack.hub import resolve

#: A vocabulary has an element for each token.
MAX_VOCABULARY = 1 << 22
_BASE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf")


@dataclass(frozen=True)
class Stored:
    """One weight of a base in its file."""

    file: Path
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class BaseModel:
    """A base model's weight names, shapes and configuration; no weight is read before `weight` asks for it.

    ``shapes`` maps every weight to its shape, in NumPy's order (``[out, in]``); ``stored`` to its place on the disk,
    empty for a model in memory.
    """

    name: str
    naming: Naming
    architecture_name: str | None
    config: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def architecture(self) -> Architecture:
        """The listed architecture; UnsupportedError when its row order is not known."""
        return architecture_of(self.architecture_name, self.naming)

    @property
    def layers(self) -> int:
        """How many blocks the model has."""
        return self._number("block_count", "num_hidden_layers", "n_layer", "num_layers")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._number("attention.head_count", "num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int:
        """Key/value heads; as many as heads when the configuration names none."""
        return self._number("attention.head_count_kv", "num_key_value_heads", default=self.heads)

    def weight(self, name: str) -> np.ndarray:
        """The weight ``name`` in float32 (float64 where the file has that), as stored: see `shapes`.

        Quantised GGUF types are dequantised. Read anew each time, and not kept.

        Raises
        ------
        UnknownNameError
            When the base has no such weight, or was not opened from files.
        UnsupportedError
            When it is quantised in a way of its own: bitsandbytes, GPTQ, AWQ, FP8 with scales beside it.
        """
        place = self.stored.get(name)
        if place is None:
            why = "it has no such weight" if self.stored else "it is in memory only, open it with open_base(path)"
            raise UnknownNameError(f"base {self.name}: weight {name} cannot be read; {why}")
        if self.config.get("quantization_config"):
            raise UnsupportedError(
                f"base {self.name}: its weights are quantised (quantization_config), which is not read here; "
                "give the model it was made from"
            )
        return place.read()

    def weight_of(self, name: str, delta: LoraDelta) -> np.ndarray:
        """The weight as what ``delta`` adds to: ``[matrices, out, in]``, one matrix but for experts.

        GPT-2's ``Conv1D`` and embeddings are turned over, a convolution is ``[out, in * kernel]``.

        Raises
        ------
        ShapeError
            When it has another shape than the adapter changes.
        """
        if problem := self.misfit(name, delta):
            raise ShapeError(f"base {self.name}: {problem}")
        array = self.weight(name)
        if delta.kind == "conv":
            return array.reshape(1, array.shape[0], -1)
        wide = array if delta.kind == "experts" else array[None]
        return (
            wide
            if wide.shape[1:] == (delta.out_features, delta.in_features)
            and not (delta.kind == "embedding" or self._is_conv1d(name))
            else wide.swapaxes(1, 2)
        )

    def misfit(self, name: str, delta: LoraDelta) -> str | None:
        """Say why ``delta`` is no update of the weight ``name``; None when it is, or its shape cannot be told."""
        shape = self.shapes.get(name)
        # A quantised weight is stored packed, in a shape of its own.
        if not shape or self.config.get("quantization_config") or shape in (wanted := self._shapes(name, delta)):
            return None
        changes = " or ".join(str(list(s)) for s in wanted)
        return f"weight {name} is {list(shape)} in the base, this adapter changes {changes}"

    def _shapes(self, name: str, delta: LoraDelta) -> list[tuple[int, ...]]:
        """The shapes of a weight that the update fits."""
        n_in, n_out = delta.in_features, delta.out_features
        if delta.kind == "embedding":
            return [(n_in, n_out)]
        if delta.kind == "conv":
            return [(n_out, *delta.factors[0].shape[1:])]
        if delta.kind == "experts":
            experts = delta.num_experts or 0
            return list(dict.fromkeys([(experts, n_out, n_in), (experts, n_in, n_out)]))
        return [(n_in, n_out) if self._is_conv1d(name) else (n_out, n_in)]

    def _is_conv1d(self, name: str) -> bool:
        """transformers' Conv1D, which only GPT-2 and its kin use for all but the head, keeps its weight [in, out]."""
        gpt2 = self.naming == "hf" and self.architecture_name in ("GPT2LMHeadModel", "GPT2Model")
        return gpt2 and name != "lm_head.weight"

    def _number(self, gguf_key: str, *hf_keys: str, default: int | None = None) -> int:
        keys = [f"{self.architecture_name}.{gguf_key}"] if self.naming == "gguf" else list(hf_keys)
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        if default is not None:
            return default
        raise FormatError(f"base {self.name}: its configuration names no {' or '.join(keys)}")


def open_base(path: str | Path) -> BaseModel:
    """The base in a Hugging Face folder, a GGUF file, or under a hub id.

    Raises
    ------
    FormatError
        When it is neither, or damaged.
    """
    given = str(path)
    where = resolve(given, patterns=_BASE_FILES)
    if where.is_dir() and not (where / "config.json").exists():
        files = sorted(where.glob("*.gguf"))
        if len(files) != 1:
            raise FormatError(f"base {given}: it has no config.json and {len(files)} .gguf files; name one of them")
        where = files[0]
    return _from_folder(where, given) if where.is_dir() else _from_gguf(where, given)


def _from_gguf(path: Path, given: str) -> BaseModel:
    reader = open_reader(path, max_elements=MAX_VOCABULARY)
    config = {key: f.contents() for key, f in reader.fields.items() if not key.startswith(("GGUF.", "tokenizer."))}
    if config.get("general.type") == "adapter":
        raise FormatError(f"base {given}: it is an adapter (general.type), give the model it was trained on")
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape.tolist())) for t in reader.tensors}
    stored = {t.name: Stored(path, partial(_dequantised, t, given)) for t in reader.tensors}
    return BaseModel(given, "gguf", config.get("general.architecture"), config, shapes, stored)


def _dequantised(tensor: gguf.ReaderTensor, given: str) -> np.ndarray:
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError, KeyError) as error:
        kind = tensor.tensor_type.name
        raise UnsupportedError(f"base {given}: tensor {tensor.name} of type {kind} cannot be read: {error}") from error
    return array.reshape(tuple(int(n) for n in reversed(tensor.shape.tolist())))


def _from_folder(folder: Path, given: str) -> BaseModel:
    config = read_object(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"base {given}: it has no .safetensors file; convert the model with save_pretrained()")
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, Stored] = {}
    for path in files:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            shapes[name] = info[1]
            stored[name] = Stored(path, partial(_floats, file, name, given))
    _check_index(folder, given, shapes)
    names = config.get("architectures") or [None]
    full = _prefixed(list(shapes), names[0])
    return BaseModel(
        given,
        "hf",
        names[0],
        config,
        {full[name]: shape for name, shape in shapes.items()},
        {full[name]: place for name, place in stored.items()},
    )


def _floats(file: SafetensorsFile, name: str, given: str) -> np.ndarray:
    stored = file.tensors[name][0]
    if stored not in FLOATS:
        raise UnsupportedError(f"base {given}: tensor {name} is {stored}, no floating-point weight")
    array = file.factor(name, allow_nonfinite=True).take()
    return array if stored == "F64" else array.astype(np.float32)


def _prefixed(names: list[str], architecture: str | None) -> dict[str, str]:
    """Each name as the model's class has it: some files on the hub (GPT-2's) leave out its prefix."""
    prefix = BY_HF[architecture].prefix + "." if architecture in BY_HF else ""
    if any(name.startswith(prefix) for name in names):
        prefix = ""
    return {name: name if name.startswith(("lm_head", "embed_out")) else prefix + name for name in names}


def _check_index(folder: Path, given: str, shapes: Mapping[str, Any]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        problems = Problems(f"base {given} is incomplete")
        missing = sorted(set(read_object(index).get("weight_map", {})) - set(shapes))
        if missing:
            problems.add(f"{len(missing)} weights of its index are in no file, such as {missing[0]}; fetch it whole")
        problems.raise_any(FormatError)
