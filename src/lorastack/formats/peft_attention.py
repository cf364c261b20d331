"""Whole `nn.MultiheadAttention` modules in PEFT: the update of the output projection lies inside that of all.

PEFT gives both one rank and one alpha, and adds that of the output projection twice (see `peft._Sorter._count_twice`).
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor

_OUT = ".out_proj"


def as_peft_keeps_it(lora: LoadedLora) -> tuple[LoadedLora, dict[str, str]]:
    """The adapter with such pairs of one rank and scaling; and where the output projections lie, by module.

    A module that has an update of its own weight and one inside is such an attention: no linear layer holds another.
    """
    inside: dict[str, str] = {}
    changed: dict[str, LoraDelta] = {}
    for name in lora.adapters:
        module = name.removesuffix(f"{_OUT}.weight")
        if module == name or f"{module}.weight" not in lora.adapters:
            continue
        whole, out = lora.adapters[f"{module}.weight"], lora.adapters[name]
        if whole.kind != "linear" or out.kind != "linear" or not whole.scaling:
            continue
        inside[module + _OUT] = f"{module}.base_layer{_OUT}"
        rank = max(whole.rank, out.rank)
        changed[f"{module}.weight"] = _of_rank(whole, rank, whole.scaling, 1.0)
        changed[name] = _of_rank(out, rank, whole.scaling, out.scaling / (2 * whole.scaling))
    return replace(lora, adapters=MappingProxyType({**lora.adapters, **changed})) if changed else lora, inside


def _of_rank(delta: LoraDelta, rank: int, scaling: float, times: float) -> LoraDelta:
    """The factors with zeros up to ``rank``, lora_B ``times`` what it was."""
    a, b = delta.factors
    more = rank - delta.rank

    def padded_a(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, more), (0, 0)))

    def padded_b(array: np.ndarray) -> np.ndarray:
        wide = np.pad(array, ((0, 0), (0, more)))
        return wide if times == 1 else (wide.astype(np.float32) * np.float32(times)).astype(wide.dtype)

    same = not more and times == 1
    factors: tuple[Factor, Factor] = (
        a.mapped(padded_a, (rank, a.shape[1])) if more else a,
        b if same else b.mapped(padded_b, (b.shape[0], rank)),
    )
    return LoraDelta(*factors, scaling, delta.kind)
