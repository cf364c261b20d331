"""The experts of an adapter one by one, or all in one parameter, whichever a reader takes.

PEFT's adapters of transformers 4 name experts one by one, those of transformers 5 target one parameter for all; vLLM
and MLX have no place for the second, GGUF none for the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lorastack.base.experts import LAYERS, beside, fused, halves, one_of, single, together
from lorastack.base.model import BaseModel
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.lazy import LazyDeltas

_Build = Callable[[], LoraDelta]


def one_by_one(lora: LoadedLora, base: BaseModel | None = None) -> LoadedLora:
    """Each expert's update by itself, under the names of the base's files; as it is where none is fused."""
    if not any(fused(name) for name in lora.adapters):
        return lora
    builds: dict[str, _Build] = {}
    for name, delta in lora.adapters.items():
        whole = fused(name)
        if not whole:
            builds[name] = partial(lora.adapters.__getitem__, name)
            continue
        block, parameter = whole
        for part in ("down",) if parameter == "down_proj" else ("gate", "up"):
            for number in range(delta.num_experts or 0):
                own = f"{_front(block, base)}.{number}.{_layer(block, part, base)}.weight"
                builds[own] = partial(_single, delta, part, number)
    return replace(lora, adapters=LazyDeltas(builds, lambda _, build: build()))


def in_one(lora: LoadedLora) -> LoadedLora:
    """The experts of each layer in one parameter, gate's rows before up's; those without an update are zero."""
    blocks: dict[str, dict[str, dict[int, str]]] = {}
    builds: dict[str, _Build] = {}
    for name in lora.adapters:
        if one := single(name):
            blocks.setdefault(one[0], {}).setdefault(one[2], {})[one[1]] = name
        else:
            builds[name] = partial(lora.adapters.__getitem__, name)
    if not blocks:
        return lora
    for block, parts in blocks.items():
        count = 1 + max(number for at in parts.values() for number in at)
        if "down" in parts:
            builds[f"{block}.down_proj"] = partial(_joined, lora, parts["down"], count)
        if "gate" in parts or "up" in parts:
            builds[f"{block}.gate_up_proj"] = partial(_both, lora, parts, count)
    return replace(lora, adapters=LazyDeltas(builds, lambda _, build: build()))


def _single(delta: LoraDelta, part: str, number: int) -> LoraDelta:
    return one_of(delta if part == "down" else halves(delta)[part == "up"], number)


def _joined(lora: LoadedLora, at: dict[int, str], count: int) -> LoraDelta:
    return together({number: lora.adapters[name] for number, name in at.items()}, count)


def _both(lora: LoadedLora, parts: dict[str, dict[int, str]], count: int) -> LoraDelta:
    gate, up = (_joined(lora, parts[part], count) if part in parts else None for part in ("gate", "up"))
    return beside(gate, up)


def _front(block: str, base: BaseModel | None) -> str:
    """The block as the base's files call it: Mixtral's is ``block_sparse_moe``, where its live model has ``mlp``."""
    known = _known(block, base)
    return known[0] if known else block


def _layer(block: str, part: str, base: BaseModel | None) -> str:
    """What one expert's layer is called: as the base's files have it, else by the name of its block."""
    known = _known(block, base)
    names = LAYERS[part]
    return names[1] if (known[1] if known else "block_sparse_moe" in block) else names[0]


def _known(block: str, base: BaseModel | None) -> tuple[str, bool] | None:
    """(block, whether its layers are w1, w2 and w3) in the base's files; None where they do not keep it one by one."""
    place = base.place_of(f"{block}.down_proj") if base else None
    one = single(place.parts[0].key) if place and place.parts else None
    return (one[0], place.parts[0].key.endswith(".w2.weight")) if one and place else None
