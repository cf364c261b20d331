"""What an adapter is, in numbers, and what is odd about it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorastack.base import BaseModel
from lorastack.base.fit import misfits
from lorastack.core.adapter import LoadedLora
from lorastack.core.dtypes import any_value, nonfinite_count
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.errors import shown
from lorastack.formats.kohya import FORMAT_KEY
from lorastack.formats.peft import NOTES_KEY
from lorastack.formats.training import short_hashes, training_of

#: adapter_config.json fields that most adapters leave at these values; others are worth a word.
_USUAL = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": ([], None),
    "target_parameters": ([], None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", None),
}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. ``scalings`` and ``ranks`` are the values that occur; ``size`` is in bytes.

    ``training`` and ``hashes`` are of image adapters: what the file says of its training, and what it is looked up by.
    """

    name: str
    path: str | None
    format: str
    base: str | None
    architecture: str | None
    weights: int
    modules: list[str]
    ranks: list[int]
    alpha: float | None
    scalings: list[float]
    dtypes: list[str]
    parameters: int
    size: int | None
    extras: dict[str, int]
    odd: list[str]
    misfits: list[str] | None
    recipe: str | None
    training: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def inspect(lora: LoadedLora, base: BaseModel | None = None) -> Inspection:
    """Read the whole adapter once and say what it is; with a base, also what would not fit.

    NaN and Inf are reported, not raised. Of an adapter whose names were converted, format, base and what is odd are
    those of the file that it came from, not of what it became.
    """
    naming, metadata = lora.as_loaded or (lora.naming, lora.metadata)
    deltas = lora.adapters
    training = training_of(metadata)
    factors = [factor for delta in deltas.values() for factor in delta.factors]
    return Inspection(
        name=lora.name,
        path=str(lora.source) if lora.source else None,
        format=_format(lora, naming, metadata),
        base=_text(metadata.get("base_model_name_or_path")) or training.base_model or None,
        architecture=_text(metadata.get("general.architecture")),
        weights=len(deltas),
        modules=list(dict.fromkeys(map(_module, deltas))),
        ranks=sorted({delta.rank for delta in deltas.values()}),
        alpha=lora.file_alpha,
        scalings=sorted({round(delta.scaling, 9) for delta in deltas.values()}),
        dtypes=sorted({factor.stored for factor in factors}),
        parameters=sum(math.prod(factor.shape) for factor in factors),
        size=sum(file.size for file in lora.opened) if lora.opened else None,
        extras={kind: len(values) for kind, values in lora.extras.items()},
        odd=[*_odd(lora, metadata), *training.odd],
        misfits=None if base is None else misfits(lora, base),
        recipe=_text(metadata.get("lorastack.recipe")),
        training={key: value for key, value in asdict(training).items() if value and key != "odd"},
        hashes=short_hashes(lora),
    )


def _module(name: str) -> str:
    """What of a layer a weight is; of a kohya name, what stands behind the last number inside it."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return re.sub(r"^lora_\w*_\d+_(?=[a-z])", "", last)


def _format(lora: LoadedLora, naming: str, metadata: Mapping[str, Any]) -> str:
    if not lora.source:
        return "in memory"
    said = metadata.get(FORMAT_KEY)
    return said if isinstance(said, str) else {"gguf": "GGUF", "hf": "PEFT"}.get(naming, "in memory")


def _text(value: object) -> str | None:
    """A field that should be a text."""
    return value if isinstance(value, str) and value else None if not value else shown(value)


def _odd(lora: LoadedLora, metadata: Mapping[str, Any]) -> list[str]:
    found = list(metadata.get(NOTES_KEY, ()))
    for name, usual in _USUAL.items():
        value = metadata.get(name)
        if value not in usual:
            found.append(f"{name} is {_text(value) or shown(value)}"[:140])
    for kind, values in lora.extras.items():
        if kind not in HARMLESS:
            found.append(f"{len(values)} {kind}: {KINDS[kind]}")
    silent, bad = [], []
    for name, delta in lora.adapters.items():
        a, b = (factor.raw() for factor in delta.factors)
        bad += [f"{name}.{part}" for part, array in (("lora_A", a), ("lora_B", b)) if nonfinite_count(array)]
        if not any_value(a) or not any_value(b):
            silent.append(name)
    if silent:
        found.append(f"{len(silent)} weights change nothing (A or B is all zero), such as {silent[0]}")
    if bad:
        found.append(f"{len(bad)} factors hold NaN or Inf, such as {bad[0]}")
    return found
