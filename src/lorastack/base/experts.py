"""Experts between GGUF, which keeps gate and up apart, and models that keep them as one parameter."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from lorastack.base.model import BaseModel
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


def expert_keys(base: BaseModel) -> dict[tuple[int, str], str]:
    """(layer, parameter) -> the base's own key of its fused expert parameters."""
    keys = {}
    for key in base.shapes:
        match = re.fullmatch(r".*\.layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)", key)
        if match:
            keys[int(match[1]), match[2]] = key
    return keys


def join_experts(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """A GGUF adapter with each layer's gate and up experts as one update of ``gate_up_proj``, exactly.

    ``[B_gate A_gate; B_up A_up]`` is the product of a block-diagonal B with A's side by side. Adapters
    without experts, and bases without fused ones, are left as they are.
    """
    keys = expert_keys(base)
    found = {name: match for name in lora.adapters if (match := _EXPERTS.fullmatch(name))}
    if not keys or not found:
        return lora
    deltas: dict[str, LoraDelta] = {}
    for name, delta in lora.adapters.items():
        match = found.get(name)
        layer = int(match[1]) if match else -1
        if match is None:
            deltas[name] = delta
        elif match[2] == "down" and (layer, "down_proj") in keys:
            deltas[keys[layer, "down_proj"]] = delta
        elif (layer, "gate_up_proj") in keys:
            key = keys[layer, "gate_up_proj"]
            if key not in deltas:
                pair = [lora.get(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
                deltas[key] = _side_by_side(pair[0], pair[1])
        else:
            deltas[name] = delta
    return replace(lora, adapters=MappingProxyType(deltas))


def _side_by_side(gate: LoraDelta | None, up: LoraDelta | None) -> LoraDelta:
    one = gate or up
    assert one is not None
    experts, half = one.num_experts or 0, one.out_features
    parts = [(n, delta) for n, delta in enumerate((gate, up)) if delta is not None]
    a = np.concatenate([delta.a.astype(np.float32) for _, delta in parts], 1)
    b = np.zeros((experts, 2 * half, a.shape[1]), np.float32)
    start = 0
    for n, delta in parts:
        b[:, n * half : (n + 1) * half, start : start + delta.rank] = delta.b.astype(np.float32) * delta.scaling
        start += delta.rank
    return LoraDelta(a, b, 1.0, "experts")
