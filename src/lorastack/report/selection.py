"""Selection: which adapters, pairs and weights a report shows one by one; it says when there are more."""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

from lorastack.algebra.compare import MATTERS
from lorastack.algebra.pairs import independent_pileup
from lorastack.report.findings import Findings, Measured

#: So many are shown.
MOST = 8


class Pair(NamedTuple):
    """Two adapters by number, and how alike they are."""

    i: int
    j: int
    cosine: float


class Cancelling(NamedTuple):
    """A weight, by number, at which two adapters cancel."""

    cosine: float
    weight: int
    i: int
    j: int


def pairs_of(found: Measured) -> list[Pair]:
    """Every pair, those that matter most first."""
    cosine = found.comparison.cosine
    pairs = [Pair(i, j, float(cosine[i, j])) for i, j in combinations(range(len(cosine)), 2)]
    return sorted(pairs, key=lambda pair: -abs(pair.cosine) if math.isfinite(pair.cosine) else 1.0)


def strongest(found: Measured) -> list[int]:
    """The adapters that are drawn one by one, in the stack's order."""
    adapters = found.comparison.adapters
    return sorted(sorted(range(len(adapters)), key=lambda n: -adapters[n].norm)[:MOST])


def cancelling(found: Findings) -> list[Cancelling]:
    """Weights and pairs that cancel there, the worst first; none where pairs are compared over all weights only."""
    by_weight, weights = found.comparison.by_weight, found.comparison.weights
    if by_weight is None:
        return []
    pairs = list(combinations(range(len(found.adapters)), 2))
    at = [(float(by_weight.cosine[n, i, j]), n, i, j) for n in range(len(weights)) for i, j in pairs]
    there = sorted((one for one in at if one[0] < -MATTERS), key=lambda one: (one[0], weights[one[1]], *one[2:]))
    return [Cancelling(*one) for one in there]


def independent(found: Findings, i: int, j: int, weight: str | None = None) -> float:
    """What two adapters would keep of their norms if they were independent, over all weights or at one."""
    pair = (found.comparison.adapters[i], found.comparison.adapters[j])
    if weight is None:
        return independent_pileup(one.norm for one in pair)
    return independent_pileup(at.norm for one in pair for at in one.weights if at.name == weight)
