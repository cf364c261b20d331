"""Combine the terms of one weight into their weighted sum: exactly, side by side, or at fewer ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lorastack.algebra.cut import Cut, Loss, relative_errors
from lorastack.algebra.lowrank import Svd, check_scales, delta_of, flat_shape, matrices, svd
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor, JoinedFactor
from lorastack.core.packed import PackedWeight, Term

#: What float32 factors can tell of a sum: `linear` keeps the ranks above it.
EXACT = Cut(tolerance=1e-6)


def cat(terms: Sequence[Term], names: Sequence[str], common: float | None = None) -> LoraDelta:
    """The exact sum: ranks side by side, ``B = [c_0 B_0, c_1 B_1, ...] / common`` with ``c = scale * scaling``.

    ``common`` becomes the scaling; the largest ``c`` when not given. A term whose ``c`` is ``common`` keeps
    its numbers to the bit. Lazy: nothing is read. Raises ShapeError when the terms do not have one shape.
    """
    PackedWeight.check(terms, names)
    check_scales(terms, names)
    kept = [(scale * delta.scaling, delta) for scale, delta in terms if scale * delta.scaling != 0]
    kind, stacked = terms[0][1].kind, terms[0][1].num_experts
    common = common or largest(terms) or 1.0
    if not kept:
        return LoraDelta(*_zeros(terms[0][1]), common, kind)
    a = _join([(1.0, delta.factors[0]) for _, delta in kept], 1 if stacked else 0)
    b = _join([(c / common, delta.factors[1]) for c, delta in kept], 1 if kind == "conv" else -1)
    return LoraDelta(a, b, common, kind)


def largest(terms: Iterable[Term]) -> float:
    """The ``scale * scaling`` of largest size: relative to it no factor grows, so none can overflow."""
    return max((scale * delta.scaling for scale, delta in terms), key=abs, default=0.0)


def weighted_sum(terms: Sequence[Term], cut: Cut | None) -> tuple[LoraDelta, Loss]:
    """The best approximation of the weighted sum at the ranks of ``cut``; ``linear`` without one.

    A truncated SVD through the R x R core of the concatenated factors (see `lowrank`).
    """
    parts = [svd(matrix) for matrix in matrices(terms)]
    return cut_off(parts, cut or EXACT, terms)


def available(terms: Sequence[Term], dense: bool = False) -> int:
    """The largest rank this weight can be given: the adapters' ranks together, any for methods on dense entries."""
    _, out, n_in = flat_shape(terms[0][1])
    side = min(out, n_in)
    return side if dense else min(side, sum(delta.rank for _, delta in terms))


def cut_off(parts: Sequence[Svd], cut: Cut, terms: Sequence[Term]) -> tuple[LoraDelta, Loss]:
    errors, norm = relative_errors(parts)
    rank = cut.rank(errors)
    kept = [part.truncated(rank) for part in parts]
    # Factors that were all stored in one type are written in that type again.
    stored = {factor.stored for _, delta in terms for factor in delta.factors}
    delta = delta_of(kept, terms[0][1], stored.pop() if len(stored) == 1 else None)
    return delta, Loss(delta.rank, norm, float(errors[min(rank, len(errors) - 1)]))


def _join(parts: list[tuple[float, Factor]], axis: int) -> Factor:
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else JoinedFactor(parts, axis)


def _zeros(delta: LoraDelta) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rank 1 that add nothing, in place of terms whose scale is 0."""
    axis = 1 if delta.num_experts else 0
    a, b = (list(factor.shape) for factor in delta.factors)
    a[axis] = 1
    b[1 if delta.kind == "conv" else -1] = 1
    return np.zeros(a, np.float32), np.zeros(b, np.float32)
