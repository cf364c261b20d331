"""BaseModel: the names and shapes of a base's weights, read from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from lorastack.base.architectures import BY_HF, Architecture, architecture_of
from lorastack.delta import LoraDelta
from lorastack.errors import FormatError, Problems
from lorastack.formats.gguf import open_reader
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.hub import resolve
from lorastack.target import Naming

#: A vocabulary has an element for each token.
MAX_VOCABULARY = 1 << 22
_BASE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf")


@dataclass(frozen=True)
class BaseModel:
    """A base model's weight names, shapes and configuration; no weight is read.

    ``shapes`` maps every weight to its shape, in NumPy's order (``[out, in]``).
    """

    name: str
    naming: Naming
    architecture_name: str | None
    config: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

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
        # transformers' Conv1D, which only GPT-2 and its kin use for all but the head, keeps its weight [in, out].
        gpt2 = self.naming == "hf" and self.architecture_name in ("GPT2LMHeadModel", "GPT2Model")
        conv1d = gpt2 and name != "lm_head.weight"
        return [(n_in, n_out) if conv1d else (n_out, n_in)]

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
    return BaseModel(given, "gguf", config.get("general.architecture"), config, shapes)


def _from_folder(folder: Path, given: str) -> BaseModel:
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise FormatError(f"base {given}: its config.json is no JSON ({error})") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"base {given}: it has no .safetensors file; convert the model with save_pretrained()")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update({name: info[1] for name, info in SafetensorsFile(file).tensors.items()})
    _check_index(folder, given, shapes)
    names = config.get("architectures") or [None]
    return BaseModel(given, "hf", names[0], config, _prefixed(shapes, names[0]))


def _prefixed(shapes: dict[str, tuple[int, ...]], architecture: str | None) -> dict[str, tuple[int, ...]]:
    """The names as the model's class has them: some files on the hub (GPT-2's) leave out its prefix."""
    prefix = BY_HF[architecture].prefix + "." if architecture in BY_HF else ""
    if any(name.startswith(prefix) for name in shapes):
        return shapes
    return {
        name if name.startswith(("lm_head", "embed_out")) else prefix + name: shape for name, shape in shapes.items()
    }


def _check_index(folder: Path, given: str, shapes: Mapping[str, Any]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        problems = Problems(f"base {given} is incomplete")
        missing = sorted(set(orjson.loads(index.read_bytes()).get("weight_map", {})) - set(shapes))
        if missing:
            problems.add(f"{len(missing)} weights of its index are in no file, such as {missing[0]}; fetch it whole")
        problems.raise_any(FormatError)
