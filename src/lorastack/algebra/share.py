"""Share: one weight of a comparison, measured by itself, in this process or in another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from lorastack.algebra.entries import Entry
from lorastack.algebra.intruders import IntruderSearch
from lorastack.algebra.lowrank import Matrix, flat_shape, matrices
from lorastack.algebra.measure import WeightMeasure, measure_weight
from lorastack.algebra.pairs import Sums, sums_of
from lorastack.algebra.signs import sign_counts
from lorastack.algebra.span import Span, span
from lorastack.base import BaseModel, open_base
from lorastack.core.delta import LoraDelta
from lorastack.errors import ArgumentError, Failures, LoraStackError, NonFiniteError


class Part(NamedTuple):
    """The update of one adapter."""

    name: str
    scale: float
    delta: LoraDelta


@dataclass
class Measured:
    """What came of a share; ``sums`` is None where there are errors.

    Attributes
    ----------
    number, weight
        The share's.
    measures
        Number of the adapter -> what it does to this weight.
    sums
        What numbers of pairs are made of.
    base_square
        The squared norm of the base's weight; 0 without the base.
    looked
        Entries that signs were compared at.
    errors
        All that went wrong.
    """

    number: int
    weight: str
    measures: dict[int, WeightMeasure] = field(default_factory=dict)
    sums: Sums | None = None
    base_square: float = 0.0
    looked: int = 0
    errors: list[LoraStackError] = field(default_factory=list)


#: Measures shares, in any order: each yields one result, as it comes.
Runner = Callable[[Iterable["Share"]], Iterator[Measured]]


@dataclass(frozen=True, eq=False)
class Share:
    """One weight with the updates of all adapters that have it; it goes to other processes with their numbers.

    Attributes
    ----------
    number, weight
        Which of the comparison's weights it is.
    count
        How many adapters there are in all.
    at
        Number of the adapter -> its update, under the base's name.
    sign_samples
        About how many entries to compare signs at; None for all.
    base
        The base, or where it is; None for none.
    intruders
        How to look for intruder dimensions; None to leave them.
    """

    number: int
    weight: str
    count: int
    at: Mapping[int, Part]
    sign_samples: int | None = None
    base: BaseModel | str | None = None
    intruders: IntruderSearch | None = None

    @classmethod
    def of(cls, number: int, weight: str, entries: list[Entry], at: Mapping[int, LoraDelta], **how: object) -> Share:
        """From the entries of the comparison and their updates of this weight."""
        parts = {n: Part(entries[n].name, entries[n].scale, delta) for n, delta in at.items()}
        return cls(number, weight, len(entries), parts, **how)  # type: ignore[arg-type]

    def portable(self) -> Share:
        """As it goes to another process: with the place of the base in place of the base."""
        if not isinstance(self.base, BaseModel):
            return self
        if not self.base.stored:
            raise ArgumentError(f"base {self.base.name} is a model in memory; give the one in its files to share work")
        return replace(self, base=self.base.name)

    def measured(self, only_read: bool = False) -> Measured:
        """Measure it; with ``only_read`` nothing but errors is looked for."""
        found = Measured(self.number, self.weight)
        failures = Failures("the adapters cannot be compared")
        base = _opened(self.base) if isinstance(self.base, str) else self.base
        like = next(iter(self.at.values())).delta
        parts = {n: failures.get(partial(_spans, part, self.weight)) or [] for n, part in self.at.items()}
        array = None if base is None else failures.get(partial(base.weight_of, self.weight, like))
        found.errors = failures.errors
        if failures or only_read:
            return found
        size = None if array is None else _norm(array)
        found.base_square = (size or 0.0) ** 2
        counts = {}
        if base is not None and array is not None and self.intruders is not None:
            counts = _intruders(self.intruders, base, self.weight, array, parts)
        for n, one in parts.items():
            sigmas = [each.span.sigma for each in one]
            found.measures[n] = measure_weight(self.weight, flat_shape(like), sigmas, size, counts.get(n))
        sums = sums_of(self.count, {n: [each.span for each in one] for n, one in parts.items()})
        for expert in range(flat_shape(like)[0]):
            matrix = [parts[n][expert].matrix if n in parts else None for n in range(self.count)]
            signs = sign_counts(matrix, self.sign_samples, (self.number, expert))
            sums.differ += signs.differ
            sums.both += signs.both
            found.looked += signs.looked
        found.sums = sums
        return found


@lru_cache(2)
def _opened(base: str) -> BaseModel:
    """The base, opened once in each process."""
    return open_base(base)


class _Span(NamedTuple):
    matrix: Matrix
    span: Span


def _spans(part: Part, weight: str) -> list[_Span]:
    found = matrices([(part.scale, part.delta)], [part.name])
    try:
        return [_Span(matrix, span(matrix)) for matrix in found]
    except NonFiniteError as error:
        raise NonFiniteError(f"{part.name}: {weight}: {error}") from error


def _intruders(
    search: IntruderSearch, base: BaseModel, weight: str, array: np.ndarray, parts: Mapping[int, list[_Span]]
) -> dict[int, tuple[int, int]]:
    """Number of the adapter -> intruders and vectors looked at, of all matrices of one weight."""
    counts = dict.fromkeys(parts, (0, 0))
    for number, matrix in enumerate(array):
        left = search.left(base, weight, number, matrix)
        for n, found in parts.items():
            many, of = search.count(left, matrix, found[number].span)
            counts[n] = counts[n][0] + many, counts[n][1] + of
    return counts


def _norm(array: np.ndarray) -> float:
    flat = array.reshape(-1)
    # A sum of squares over millions of values in float32 would lose digits; the whole in float64 would double memory.
    parts = (flat[at : at + (1 << 20)].astype(np.float64) for at in range(0, flat.size, 1 << 20))
    return math.sqrt(sum(float(part @ part) for part in parts))
