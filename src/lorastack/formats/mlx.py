"""Read MLX's adapters: ``adapters.safetensors`` beside an adapter_config.json with ``lora_parameters``.

Factors of a layer are kept turned over, ``lora_a [in, rank]`` and ``lora_b [rank, out]``, those of experts are not
(mlx_lm/tuner/lora.py); the one ``scale`` of the configuration multiplies as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import Kind, LoraDelta
from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.kohya import FORMAT_KEY
from lorastack.formats.opened import OpenedFile
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.safetensors_file import FLOATS, SafetensorsFile

WEIGHTS = "adapters.safetensors"
#: The experts of a layer, which others keep one by one.
EXPERTS = ".switch_mlp."
#: What MLX's models call their embeddings: the only layers whose factors are rows by token.
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|wpe|tok_embeddings|word_embeddings|embeddings?|embed_in|shared)")
_PARTS = {"lora_a": "a", "lora_b": "b", "m": "dora"}


class _How(NamedTuple):
    a: str
    b: str
    kind: Kind
    expert: int | None


def is_mlx(raw: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is MLX's."""
    return "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw)


def load(
    config_file: OpenedFile,
    raw: dict[str, Any],
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    weights: OpenedFile | None = None,
) -> LoadedLora:
    """Open an MLX adapter: configuration and header are checked, the factors stay in the file.

    Raises
    ------
    FormatError
        Listing everything that is wrong with it.
    """
    folder = config_file.path.parent
    problems = Problems(f"cannot load {folder}")
    scale, dora = _settings(raw, str(config_file), problems)
    if weights is None and not os.path.isfile(folder / WEIGHTS):
        problems.add(f"{folder}: it has {CONFIG_NAME} as MLX writes it, but no {WEIGHTS}; fetch it whole")
        problems.raise_any(FormatError)
    tensors = SafetensorsFile(weights or folder / WEIGHTS)
    sorted_ = _Sorter(tensors, allow_nonfinite, problems)
    magnitudes = sorted_.extras.get("dora", {})
    if dora != bool(magnitudes) and not problems:
        problems.add(
            f"{tensors.path}: it {'has no' if dora else 'has'} DoRA magnitudes (.m), which {config_file} "
            f"says it {'has' if dora else 'has not'} (fine_tune_type)"
        )
    problems.raise_any(FormatError)

    def build(_: str, how: _How) -> LoraDelta:
        a, b = (tensors.factor(key, allow_nonfinite) for key in (how.a, how.b))
        if how.expert is not None:
            a, b = _of_expert(a, how.expert), _of_expert(b, how.expert)
        else:
            a, b = (factor.mapped(np.transpose, factor.shape[::-1]) for factor in (a, b))
        return LoraDelta(a, b, scale, how.kind)

    model = raw.get("model")
    metadata = {**raw, **tensors.metadata, FORMAT_KEY: "MLX"}
    if isinstance(model, str) and model:
        metadata["base_model_name_or_path"] = model
    return LoadedLora(
        name=name or os.path.basename(os.path.abspath(folder)),
        adapters=LazyDeltas(sorted_.how, build),
        extras=MappingProxyType({kind: MappingProxyType(values) for kind, values in sorted_.extras.items()}),
        metadata=MappingProxyType(metadata),
        naming="hf",
        source=weights.path if weights else folder,
        opened=(config_file, *tensors.files),
    )


def _settings(raw: dict[str, Any], label: str, problems: Problems) -> tuple[float, bool]:
    """(scale, whether it is DoRA) of a configuration; ``rank`` is the arrays' own, ``alpha`` is not used by MLX."""
    said = raw.get("lora_parameters")
    if not isinstance(said, dict):
        problems.add(f"{label}: lora_parameters is {shown(said)}, expected fields with values")
        said = {}
    scale = said.get("scale")
    if type(scale) not in (int, float) or not abs(scale) <= FLOAT32_MAX:  # type: ignore[arg-type]
        if said:
            problems.add(f"{label}: lora_parameters has scale {shown(scale)}, expected a finite number")
        scale = 1.0
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        why = "it is whole weights, no adapter" if kind == "full" else "expected lora or dora"
        problems.add(f"{label}: fine_tune_type is {shown(kind)}: {why}")
    return float(scale), kind == "dora"  # type: ignore[arg-type]


class _Sorter:
    """Sorts the tensors into ``how`` and ``extras``."""

    def __init__(self, tensors: SafetensorsFile, allow_nonfinite: bool, problems: Problems) -> None:
        self._tensors, self._problems = tensors, problems
        self.how: dict[str, _How] = {}
        self.extras: dict[str, dict[str, Factor]] = {}
        parts: dict[str, dict[str, str]] = {}
        for key, (dtype, shape, _, _) in tensors.tensors.items():
            module, _, ending = key.rpartition(".")
            if not module or ending not in _PARTS:
                problems.add(f"{tensors.path}: tensor {key} is no part of an MLX LoRA adapter")
            elif dtype not in FLOATS:
                problems.add(f"{tensors.path}: tensor {key} is {dtype}, expected a float type")
            elif 0 in shape:
                problems.add(f"{tensors.path}: tensor {key} is empty, a dimension is 0: {list(shape)}")
            else:
                parts.setdefault(module, {})[_PARTS[ending]] = key
        for module, at in parts.items():
            self._take(module, at, allow_nonfinite)
        if not self.how and not problems:
            problems.add(f"{tensors.path}: it has no lora_a and lora_b, so it would change nothing")

    def _take(self, module: str, at: dict[str, str], allow_nonfinite: bool) -> None:
        where, tensors = self._tensors.path, self._tensors.tensors
        if missing := {"a", "b"} - set(at):
            lacks = " and ".join(f"lora_{part}" for part in sorted(missing))
            self._problems.add(f"{where}: module {module} has no {lacks}; save the adapter again")
            return
        a, b = tensors[at["a"]][1], tensors[at["b"]][1]
        if len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]:
            for expert in range(a[0]):
                self.how[_expert_name(module, expert)] = _How(at["a"], at["b"], "linear", expert)
            if "dora" in at:
                self._problems.add(f"{where}: module {module} has a DoRA magnitude of experts, which MLX has not")
            return
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            self._problems.add(f"{where}: module {module}: lora_a is {a} and lora_b is {b}; they do not fit")
            return
        embedding = _EMBEDDING.fullmatch(module) is not None
        name = f"{module}.weight"
        self.how[name] = _How(at["a"], at["b"], "embedding" if embedding else "linear", None)
        if key := at.get("dora"):
            shape = tensors[key][1]
            if embedding or shape != (b[1],):
                what = "of an embedding, which is not read" if embedding else f"{shape}, its lora_b has {b[1]} columns"
                self._problems.add(f"{where}: module {module}: its DoRA magnitude is {what}")
                return
            self.extras.setdefault("dora", {})[name] = self._tensors.factor(key, allow_nonfinite)


def _expert_name(module: str, expert: int) -> str:
    """The weight of one expert, as it is named where they are kept one by one.

    >>> _expert_name("model.layers.0.mlp.switch_mlp.up_proj", 3)
    'model.layers.0.mlp.experts.3.up_proj.weight'
    """
    block, _, layer = module.rpartition(".")
    block = f"{block.removesuffix('.switch_mlp')}.experts" if block.endswith(".switch_mlp") else block
    return f"{block}.{expert}.{layer}.weight"


def _of_expert(factor: Factor, expert: int) -> Factor:
    return factor.mapped(partial(_at, expert), factor.shape[1:])


def _at(expert: int, array: np.ndarray) -> np.ndarray:
    return array[expert]
