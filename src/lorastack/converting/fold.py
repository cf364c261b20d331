"""Fold: one rank and one scaling for all weights, where a reader knows no other; the updates stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas


def one_scaling(lora: LoadedLora) -> LoadedLora:
    """The adapter with a scaling of 1 at each weight, what they were folded into lora_B; as it is where all are one.

    >>> pair = np.ones((1, 2)), np.ones((2, 1), np.float32)
    >>> lora = LoadedLora.from_tensors({"a": LoraDelta(*pair, 0.5), "b": LoraDelta(*pair, 2.0)})
    >>> {name: (delta.scaling, delta.b[0, 0]) for name, delta in one_scaling(lora).adapters.items()}
    {'a': (1.0, np.float32(0.5)), 'b': (1.0, np.float32(2.0))}
    """
    if len({delta.scaling for delta in lora.adapters.values()}) == 1:
        return lora
    return _each(lora, _folded)


def one_rank(lora: LoadedLora) -> LoadedLora:
    """The adapter with its largest rank at each weight, smaller ones filled up with zeros."""
    if len({delta.rank for delta in lora.adapters.values()}) == 1:
        return lora
    rank = lora.rank
    return _each(lora, lambda delta: _filled(delta, rank))


def _each(lora: LoadedLora, change: Callable[[LoraDelta], LoraDelta]) -> LoadedLora:
    return replace(lora, adapters=LazyDeltas(dict.fromkeys(lora.adapters), lambda name, _: change(lora.adapters[name])))


def _folded(delta: LoraDelta) -> LoraDelta:
    """In float32: what is multiplied would be rounded a second time in a type of 16 bits."""
    if delta.scaling == 1.0:
        return delta
    a, b = delta.factors
    wide = np.dtype(np.float64 if b.dtype == np.float64 else np.float32)
    times = delta.scaling
    folded = Factor(b.shape, wide, lambda: b.cast(times, wide), b.label, b.allow_nonfinite, b.stored)
    return LoraDelta(a, folded, 1.0, delta.kind)


def _filled(delta: LoraDelta, rank: int) -> LoraDelta:
    a, b = delta.factors
    if delta.rank == rank:
        return delta
    first, second = (1, 2) if delta.kind == "experts" else (0, 1)
    return LoraDelta(_padded(a, first, rank), _padded(b, second, rank), delta.scaling, delta.kind)


def _padded(factor: Factor, axis: int, size: int) -> Factor:
    shape = tuple(size if n == axis else count for n, count in enumerate(factor.shape))
    more = [(0, wanted - there) for wanted, there in zip(shape, factor.shape, strict=True)]
    return factor.mapped(lambda array: np.pad(array, more), shape)
