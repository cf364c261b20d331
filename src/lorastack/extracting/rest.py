"""Rest: what a fine-tune changed that is not low-rank, and how an adapter saves it whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lorastack.base.model import BaseModel
from lorastack.base.roles import role_of
from lorastack.core.factor import Factor
from lorastack.errors import NonFiniteError
from lorastack.extracting.difference import Difference
from lorastack.extracting.pairs import Pairs
from lorastack.formats.safetensors_file import SafetensorsFile

#: Weights that a module may have in another size: those with a row for each token.
_PER_TOKEN = ("embedding", "head")


def changed(name: str, finetuned: BaseModel, base: BaseModel) -> float | None:
    """``||difference|| / ||base||`` of a weight that both have in one shape; None where it is the same.

    Raises
    ------
    NonFiniteError
        When one of the models has NaN or Inf there.
    """
    squares, before = Difference(finetuned.stored[name], base.stored[name], base.shapes[name]).squares()
    if not math.isfinite(squares) or not math.isfinite(before):
        raise NonFiniteError(f"weight {name}: one of the models has NaN or Inf there")
    return math.sqrt(squares / before) if squares and before else math.inf if squares else None


@dataclass
class Saved:
    """What is saved whole: the extras and the metadata of an adapter, and weights for which it has no place."""

    extras: dict[str, dict[str, Factor]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    unsaved: list[str] = field(default_factory=list)


def saved(names: Sequence[str], pairs: Pairs, targets: Sequence[str], finetuned: BaseModel, base: BaseModel) -> Saved:
    """The weights ``names`` of the fine-tuned model as what an adapter saves.

    A bias of a linear layer is saved by itself, anything else with its whole module (``modules_to_save``): where that
    has a low-rank update itself or in it, there is no place for the weight.
    """
    found = Saved()
    modules: dict[str, Mapping[str, Factor]] = {}
    biases: dict[str, str] = {}
    for name in names:
        module = name.rpartition(".")[0]
        if bias := _as_bias(name, base):
            biases[bias] = name
        elif _has_a_place(name, module, pairs, targets, base):
            for one in _with_second_names(module, name, finetuned, base):
                modules[one] = _whole(one, finetuned)
        else:
            found.unsaved.append(name)
    inside = {name for parts in modules.values() for name in parts}
    if alone := {bias: _factor(finetuned, name) for bias, name in biases.items() if bias not in inside}:
        found.extras["bias"] = alone
    if modules:
        found.metadata["modules_to_save"] = sorted(modules)
        found.extras["modules_to_save"] = {name: at for parts in modules.values() for name, at in parts.items()}
    if "bias" in found.extras:
        found.metadata["bias"] = "all"
    return found


def _as_bias(name: str, base: BaseModel) -> str | None:
    """The name under which it is the bias of a layer that an adapter may have an update of; None where it is none."""
    for one in (name, *(other for other, of in base.tied.items() if of == name)):
        module, _, parameter = one.rpartition(".")
        if parameter == "bias" and role_of(base, f"{module}.weight") in ("linear", "head", "conv"):
            return one if one in base.shapes else None
    return None


def _has_a_place(name: str, module: str, pairs: Pairs, targets: Sequence[str], base: BaseModel) -> bool:
    """Whether the module can be replaced: the base has it, in this size, and no update is in it."""
    if not module or name not in base.shapes or (name in pairs.reshaped and role_of(base, name) not in _PER_TOKEN):
        return False
    return not any(target == module or target.startswith(f"{module}.") for target in targets)


def _with_second_names(module: str, name: str, finetuned: BaseModel, base: BaseModel) -> list[str]:
    """The module, and those that share its weight in both models: an adapter's copy would be one of its own."""
    shared = [
        other.rpartition(".")[0]
        for other, of in base.tied.items()
        if of == name and finetuned.tied.get(other) == name and other in finetuned.stored
    ]
    return [module, *shared]


def _whole(module: str, finetuned: BaseModel) -> Mapping[str, Factor]:
    """Every parameter that lies directly in the module."""
    inside = [name for name in finetuned.stored if name.rpartition(".")[0] == module]
    return {name: _factor(finetuned, name) for name in inside}


def _factor(model: BaseModel, name: str) -> Factor:
    """A weight in the type it is stored in, read when it is written."""
    parts = model.stored[name].parts
    if len(parts) == 1 and isinstance(file := parts[0].file, SafetensorsFile) and parts[0].rows is None:
        factor = file.factor(parts[0].key)
        if factor.shape == model.shapes[name]:
            return factor
    return Factor(model.shapes[name], np.dtype(np.float32), partial(_read, model, name), f"{model.name}: {name}")


def _read(model: BaseModel, name: str) -> np.ndarray:
    return model.weight(name).astype(np.float32, copy=False)
