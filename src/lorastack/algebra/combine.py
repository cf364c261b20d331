"""Combine the terms of one weight into one update; one function per method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorastack.delta import LoraDelta
from lorastack.factor import Factor, JoinedFactor
from lorastack.packed import PackedWeight, Term


def cat(terms: Sequence[Term], names: Sequence[str]) -> LoraDelta:
    """The exact sum: ranks side by side, ``B = [c_0 B_0, c_1 B_1, ...]`` with ``c = scale * scaling``.

    Where every term has the same ``c`` it stays the scaling and the factors are only put side by side.
    Lazy: nothing is read. Raises ShapeError when the terms do not have one shape.
    """
    PackedWeight.check(terms, names)
    kept = [(scale * delta.scaling, delta) for scale, delta in terms if scale * delta.scaling != 0]
    kind = terms[0][1].kind
    if not kept:
        return LoraDelta(*_zeros(terms[0][1]), 1.0, kind)
    coefficients = {c for c, _ in kept}
    common = coefficients.pop() if len(coefficients) == 1 else 1.0
    a = _join([(1.0, delta.factors[0]) for _, delta in kept], 1 if kind == "experts" else 0)
    b = _join([(c / common, delta.factors[1]) for c, delta in kept], 1 if kind == "conv" else -1)
    return LoraDelta(a, b, common, kind)


def folded(delta: LoraDelta) -> LoraDelta:
    """The same update with a scaling of 1, its scaling multiplied into B."""
    a, b = delta.factors
    return delta if delta.scaling == 1.0 else LoraDelta(a, JoinedFactor([(delta.scaling, b)], -1), 1.0, delta.kind)


def _join(parts: list[tuple[float, Factor]], axis: int) -> Factor:
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else JoinedFactor(parts, axis)


def _zeros(delta: LoraDelta) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rank 1 that add nothing, in place of terms whose scale is 0."""
    axis = 1 if delta.kind == "experts" else 0
    a, b = (list(factor.shape) for factor in delta.factors)
    a[axis] = 1
    b[1 if delta.kind == "conv" else -1] = 1
    return np.zeros(a, np.float32), np.zeros(b, np.float32)
