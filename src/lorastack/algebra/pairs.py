"""Pairs: what holds between every two adapters, and the sums over weights that it is made of.

Each update is brought to its singular vectors once; then two products of all of them side by side give every inner
product and every overlap of a weight: ``<X, Y> = sum s_i t_j (u_i . u_j)(v_i . v_j)``. That is O(R²(in + out)) for R
ranks in all, and no out x in matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lorastack.algebra.span import Span

#: Up to so many adapters the numbers of each weight are kept too, and products are taken in float64.
FEW = 32


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """Numbers of every pair, ``[N, N]`` (of each weight: ``[weights, N, N]``), float64, NaN where there is none.

    Attributes
    ----------
    cosine
        ``<X, Y> / (|X| |Y|)``, over all entries of all weights; a weight that one of them lacks counts as zeros there.
    in_overlap, out_overlap
        The mean squared cosine of the principal angles between the row spaces (what they read, ``[in]``) and between
        the column spaces (what they write, ``[out]``), over the weights that both change: 1 means that one space
        lies in the other.
    in_chance, out_chance
        What random subspaces of the same dimensions have on average: ``max(p, q) / m`` in m dimensions.
    sign_conflict
        Of the entries that both change, the part whose signs differ; independent updates have 0.5.
    pileup
        ``|X + Y| / (|X| + |Y|)``: 0 when they cancel, 0.71 when orthogonal and of one norm, 1 when they point the same
        way.
    """

    cosine: np.ndarray
    in_overlap: np.ndarray
    in_chance: np.ndarray
    out_overlap: np.ndarray
    out_chance: np.ndarray
    sign_conflict: np.ndarray
    pileup: np.ndarray

    def pair(self, i: int, j: int) -> dict[str, float | list[float | None] | None]:
        """The numbers of one pair by name, None where there is none; lists where they are kept by weight."""
        found: dict[str, float | list[float | None] | None] = {}
        for name in NUMBERS:
            value = getattr(self, name)[..., i, j]
            found[name] = [plain(v) for v in value] if value.ndim else plain(value)
        return found


#: The numbers of a pair.
NUMBERS = tuple(field.name for field in fields(Pairs))


@dataclass
class Sums:
    """What numbers of pairs are made of, ``[N, N]`` each; those of several weights add up."""

    inner: np.ndarray
    shared_in: np.ndarray
    shared_out: np.ndarray
    expected_in: np.ndarray
    expected_out: np.ndarray
    smaller: np.ndarray
    differ: np.ndarray
    both: np.ndarray

    @classmethod
    def zeros(cls, count: int) -> Sums:
        """The sums over no weight."""
        return cls(*(np.zeros((count, count)) for _ in fields(cls)))

    def add(self, other: Sums) -> None:
        """Add another weight's."""
        for one in fields(self):
            getattr(self, one.name).__iadd__(getattr(other, one.name))


def sums_of(count: int, spans: Mapping[int, Sequence[Span]]) -> Sums:
    """Everything of one weight but the signs; experts add up as weights do."""
    sums = Sums.zeros(count)
    dtype = np.float64 if count <= FEW else np.float32
    for expert in zip(*spans.values(), strict=True):
        there = [(n, one) for n, one in zip(spans, expert, strict=True) if one.rank]
        if not there:
            continue
        at = np.ix_([n for n, _ in there], [n for n, _ in there])
        ranks = np.array([one.rank for _, one in there])
        starts = np.cumsum(ranks) - ranks
        sigma = np.concatenate([one.sigma for _, one in there])
        outs = _gram(np.concatenate([one.u for _, one in there], 1, dtype=dtype))
        ins = _gram(np.concatenate([one.v for _, one in there], 1, dtype=dtype))
        sums.inner[at] += _blocks(outs * ins * sigma * sigma[:, None], starts)
        sums.shared_out[at] += _blocks(outs * outs, starts)
        sums.shared_in[at] += _blocks(ins * ins, starts)
        sums.expected_out[at] += np.outer(ranks, ranks) / there[0][1].u.shape[0]
        sums.expected_in[at] += np.outer(ranks, ranks) / there[0][1].v.shape[0]
        sums.smaller[at] += np.minimum.outer(ranks, ranks)
    return sums


def _gram(x: np.ndarray) -> np.ndarray:
    return x.T @ x


def _blocks(x: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum of each block of a symmetric matrix whose blocks begin at ``starts``, both ways: symmetric to the bit."""
    found = np.add.reduceat(np.add.reduceat(x, starts, 0, dtype=np.float64), starts, 1)
    return (found + found.T) / 2


def pairs_of(sums: Sums) -> Pairs:
    """The numbers of every pair."""
    squares = sums.inner.diagonal()
    norms = np.sqrt(squares)
    together = np.sqrt(np.maximum(squares + squares[:, None] + 2 * sums.inner, 0))
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NaN: no number
        return Pairs(
            cosine=np.clip(sums.inner / (norms * norms[:, None]), -1, 1),
            in_overlap=np.clip(sums.shared_in / sums.smaller, 0, 1),
            in_chance=sums.expected_in / sums.smaller,
            out_overlap=np.clip(sums.shared_out / sums.smaller, 0, 1),
            out_chance=sums.expected_out / sums.smaller,
            sign_conflict=sums.differ / sums.both,
            pileup=np.minimum(together / (norms + norms[:, None]), 1),
        )


def stacked(each: Sequence[Pairs]) -> Pairs:
    """The pairs of several weights as one, ``[weights, N, N]``."""
    return Pairs(**{name: np.stack([getattr(one, name) for one in each]) for name in NUMBERS})


def independent_pileup(norms: Iterable[float]) -> float:
    """The norm of a sum over the sum of the norms, if all were orthogonal to each other; NaN when all are zero.

    >>> f"{independent_pileup([1.0, 1.0]):.3f}, {independent_pileup([3.0, 4.0, 0.0]):.3f}"
    '0.707, 0.714'
    """
    lengths = list(norms)
    return math.hypot(*lengths) / sum(lengths) if any(lengths) else math.nan


def plain(value: Any) -> float | None:
    """A number as JSON can have it: None for NaN."""
    return float(value) if math.isfinite(value) else None
