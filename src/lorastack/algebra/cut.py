"""Cut: where a singular value decomposition ends, and what is lost there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from lorastack.algebra.lowrank import Svd
from lorastack.errors import ArgumentError, Problems
from lorastack.ways import argument

#: What a list of ranks is chosen by where nothing else is said.
ENERGY = 0.99


@dataclass(frozen=True)
class Cut:
    """How many singular values each weight keeps.

    Of ``ranks`` (all, when empty) the smallest at which the relative error, in the Frobenius norm, is at most
    ``tolerance``; the largest of them when there is none, or no tolerance.
    """

    ranks: tuple[int, ...] = ()
    tolerance: float | None = None

    @classmethod
    def of(
        cls, rank: int | Sequence[int] | None, energy: float | None = None, tolerance: float | None = None
    ) -> Cut | None:
        """The cut that was asked for, None when there was none; ``energy`` e is a tolerance of ``√(1 - e)``.

        Raises
        ------
        ArgumentError
            Listing everything that has no meaning.
        """
        problems = Problems("this cut has no meaning")
        several = isinstance(rank, Sequence) and not isinstance(rank, str)
        ranks: list[Any] = list(rank) if several else [] if rank is None else [rank]  # type: ignore[arg-type]
        if several and not ranks:
            problems.add(f"{argument('rank')} is an empty list; give the ranks to choose from")
        for one in ranks:
            if isinstance(one, bool) or not isinstance(one, Integral) or one < 1:
                problems.add(f"{argument('rank')} is {one!r}, expected a whole number from 1 on")
        if energy is not None and not (_is_number(energy) and 0 < energy <= 1):
            problems.add(f"{argument('energy')} is {energy!r}, expected a number above 0 and up to 1, such as 0.99")
        if tolerance is not None and not (_is_number(tolerance) and 0 <= tolerance < 1):
            problems.add(
                f"{argument('tolerance')} is {tolerance!r}, expected a number from 0 to below 1, such as 0.001"
            )
        if energy is not None and tolerance is not None:
            problems.add(f"{argument('energy')} and {argument('tolerance')} say the same in two ways; give one of them")
        problems.raise_any(ArgumentError)
        if not ranks and energy is None and tolerance is None:
            return None
        if len(ranks) > 1 and energy is None and tolerance is None:
            energy = ENERGY
        return cls(
            tuple(sorted({int(one) for one in ranks})), math.sqrt(1 - energy) if energy is not None else tolerance
        )

    def at_most(self, rank: int) -> Cut:
        """With no rank above ``rank``: where there is no more to keep, all of it is what was asked for."""
        return replace(self, ranks=tuple(sorted({min(one, rank) for one in self.ranks})))

    def rank(self, errors: np.ndarray) -> int:
        """The rank to keep, where ``errors[r]`` is the relative error at rank r, from 0 to all there is."""
        most = max(1, len(errors) - 1)
        ranks = sorted({min(rank, most) for rank in self.ranks}) or range(1, most + 1)
        if self.tolerance is not None:
            for rank in ranks:
                if rank >= len(errors) or errors[rank] <= self.tolerance:
                    return rank
        return ranks[-1]


@dataclass(frozen=True)
class Loss:
    """What a cut lost at one weight: ``error`` is ``||D - D_cut|| / ||D||``, exact, before the file's rounding."""

    rank: int
    norm: float
    error: float


def overall(losses: Mapping[str, Loss]) -> float:
    """The relative error of all weights together, as one long vector."""
    total = sum(loss.norm**2 for loss in losses.values())
    return math.sqrt(sum((loss.error * loss.norm) ** 2 for loss in losses.values()) / total) if total else 0.0


def relative_errors(parts: Sequence[Svd]) -> tuple[np.ndarray, float]:
    """The relative error at every rank from 0 on, experts cut alike, and the norm.

    The sums run from the smallest singular value up, so that small tails keep their digits.
    """
    most = max(len(part.sigma) for part in parts)
    squares = np.zeros(most + 1)
    for part in parts:
        squares[: len(part.sigma)] += part.sigma**2
    squares[-1] = sum(max(part.rest, 0.0) for part in parts)
    tails = np.cumsum(squares[::-1])[::-1]
    return (np.sqrt(tails / tails[0]) if tails[0] else np.zeros(most + 1)), math.sqrt(tails[0])


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
