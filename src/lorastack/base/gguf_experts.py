"""Experts between GGUF, which keeps gate, up and down of a layer apart, and models that have them otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from lorastack.base.experts import beside, fused, halves, single, together
from lorastack.base.model import BaseModel
from lorastack.base.settle import settle
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.target import Naming

_TENSOR = re.compile(r"blk\.(\d{1,9})\.ffn_(gate|up|down)_exps\.weight")
_LAYER = re.compile(r".*\.layers\.(\d{1,9})\..+")


def gguf_experts(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """An adapter with Hugging Face names, its experts under their GGUF names; all else stays as it is."""
    deltas: dict[str, LoraDelta] = {}
    singles: dict[str, dict[int, LoraDelta]] = {}
    for name in lora.adapters:
        layer = _LAYER.fullmatch(name)
        one, whole = single(name), fused(name)
        if layer and one:
            singles.setdefault(_tensor(layer[1], one[2]), {})[one[1]] = lora.adapters[name]
        elif layer and whole and lora.adapters[name].kind == "experts":
            delta = _computed(lora.adapters[name], layer[1], name, base)
            both = _halved(delta, base, to="gguf") if whole[1] != "down_proj" else None
            parts = dict(zip(("gate", "up"), halves(both), strict=True)) if both else {"down": delta}
            deltas |= {_tensor(layer[1], part): value for part, value in parts.items()}
        else:
            deltas[name] = lora.adapters[name]
    if len(deltas) == len(lora.adapters) and deltas.keys() == lora.adapters.keys():
        return lora
    for tensor, members in singles.items():
        deltas[tensor] = together(members, base.experts_in(tensor) or _said(base) or 1 + max(members))
    return replace(lora, adapters=MappingProxyType(deltas))


def hf_experts(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """A GGUF adapter, its experts under the base's own names, exactly; all else stays as it is."""
    found = {name: match for name in lora.adapters if (match := _TENSOR.fullmatch(name))}
    blocks = _blocks(base) if found else {}
    if not blocks:
        return lora
    deltas: dict[str, LoraDelta] = {}
    for name, delta in lora.adapters.items():
        match = found.get(name)
        block = blocks.get(int(match[1])) if match else None
        if match is None or block is None:
            deltas[name] = delta
        elif match[2] == "down":
            deltas[f"{block}.down_proj"] = _as_it_lies(delta, base)
        elif (holder := f"{block}.gate_up_proj") not in deltas:
            both = beside(*(lora.get(_tensor(match[1], part)) for part in ("gate", "up")))
            deltas[holder] = _as_it_lies(_halved(both, base, to="hf"), base)
    experts = LoadedLora(lora.name, {n: d for n, d in deltas.items() if n not in lora.adapters}, naming="hf")
    settled = settle(experts, base).adapters  # a base that keeps them one by one
    rest: Mapping[str, LoraDelta] = {name: delta for name, delta in deltas.items() if name in lora.adapters}
    return replace(lora, adapters=MappingProxyType({**rest, **settled}))


def _halved(both: LoraDelta, base: BaseModel, to: Naming) -> LoraDelta:
    """The update of gate and up with gate's rows first; or, towards Hugging Face, as the base has them."""
    if base.architecture.experts == "halves":
        return both
    a, b = both.factors

    def change(x: np.ndarray) -> np.ndarray:
        parts = (x.shape[1] // 2, 2) if to == "gguf" else (2, x.shape[1] // 2)
        return x.reshape(x.shape[0], *parts, x.shape[2]).swapaxes(1, 2).reshape(x.shape)

    return LoraDelta(a, b.mapped(change, b.shape), both.scaling, "experts")


def _computed(delta: LoraDelta, layer: str, name: str, base: BaseModel) -> LoraDelta:
    """The update ``[E, out, in]`` where the architecture's adapters have it of a parameter that is ``[E, in, out]``."""
    if not base.architecture.as_it_lies:
        return delta
    down = name.endswith("down_proj")
    shape = base.shape_of(name if base.naming == "hf" else _tensor(layer, "down" if down else "gate")) or ()
    if base.naming == "hf":
        shape = shape[:-2] + shape[:-3:-1]
    elif shape and not down:
        shape = (shape[0], 2 * shape[1], shape[2])
    found = (delta.out_features, delta.in_features)
    return delta if shape[-2:] == found and found[0] != found[1] else delta.over("experts")


def _as_it_lies(delta: LoraDelta, base: BaseModel) -> LoraDelta:
    return delta.over("experts") if base.architecture.as_it_lies else delta


def _tensor(layer: str, part: str) -> str:
    return f"blk.{layer}.ffn_{part}_exps.weight"


def _blocks(base: BaseModel) -> dict[int, str]:
    """Layer -> what the base calls the module that has its experts."""
    blocks = {}
    for name in base.shapes:
        layer, found = _LAYER.fullmatch(name), fused(name) or single(name)
        if layer and found:
            blocks[int(layer[1])] = found[0]
    return blocks


def _said(base: BaseModel) -> int | None:
    """The number of experts that the configuration names."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts", f"{base.architecture_name}.expert_count")
    return next((value for key in keys if isinstance(value := base.config.get(key), int) and value > 0), None)
