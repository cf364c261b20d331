"""Combine the terms of one weight into one update; one function per method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lorastack.delta import LoraDelta
from lorastack.factor import Factor, JoinedFactor
from lorastack.packed import PackedWeight, Term


def cat(terms: Sequence[Term], names: Sequence[str], common: float | None = None) -> LoraDelta:
    """The exact sum: ranks side by side, ``B = [c_0 B_0, c_1 B_1, ...] / common`` with ``c = scale * scaling``.

    ``common`` becomes the scaling; the largest ``c`` when not given. A term whose ``c`` is ``common`` keeps
    its numbers to the bit. Lazy: nothing is read. Raises ShapeError when the terms do not have one shape.
    """
    PackedWeight.check(terms, names)
    kept = [(scale * delta.scaling, delta) for scale, delta in terms if scale * delta.scaling != 0]
    kind = terms[0][1].kind
    common = common or largest(terms) or 1.0
    if not kept:
        return LoraDelta(*_zeros(terms[0][1]), common, kind)
    a = _join([(1.0, delta.factors[0]) for _, delta in kept], 1 if kind == "experts" else 0)
    b = _join([(c / common, delta.factors[1]) for c, delta in kept], 1 if kind == "conv" else -1)
    return LoraDelta(a, b, common, kind)


def largest(terms: Iterable[Term]) -> float:
    """The ``scale * scaling`` of largest size: relative to it no factor grows, so none can overflow."""
    return max((scale * delta.scaling for scale, delta in terms), key=abs, default=0.0)


def _join(parts: list[tuple[float, Factor]], axis: int) -> Factor:
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else JoinedFactor(parts, axis)


def _zeros(delta: LoraDelta) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rank 1 that add nothing, in place of terms whose scale is 0."""
    axis = 1 if delta.kind == "experts" else 0
    a, b = (list(factor.shape) for factor in delta.factors)
    a[axis] = 1
    b[1 if delta.kind == "conv" else -1] = 1
    return np.zeros(a, np.float32), np.zeros(b, np.float32)
