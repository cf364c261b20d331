"""Update: the difference of one weight as a low-rank update, with what that leaves out."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from lorastack.algebra.cut import Cut, Loss, relative_errors
from lorastack.algebra.lowrank import Matrix, Svd
from lorastack.algebra.randomised import leading, whole
from lorastack.base.model import BaseModel
from lorastack.core.delta import Kind, LoraDelta
from lorastack.core.dtypes import nonfinite_count
from lorastack.core.factor import Factor
from lorastack.errors import NonFiniteError
from lorastack.extracting.difference import Difference

#: Where no rank is given, this many singular values are looked for first, then twice as many.
_FIRST = 32


@dataclass(frozen=True)
class How:
    """What is kept of a difference; ``exact`` decomposes it in full."""

    cut: Cut
    exact: bool = False
    seed: int = 0


class Changed:
    """One weight that an adapter can hold the difference of, as matrices ``[out, in]``: one, or one for each expert."""

    def __init__(self, name: str, kind: Kind, finetuned: BaseModel, base: BaseModel) -> None:
        self.name, self.kind = name, kind
        self.shape = base.shapes[name]
        self.count = self.shape[0] if kind == "experts" else 1
        columns = math.prod(self.shape[1:]) if kind == "conv" else self.shape[-1]
        self._turned = base.kept_turned(name, kind)
        self._difference = Difference(finetuned.stored[name], base.stored[name], self.shape, columns)
        self._rows = self._difference.count // self.count

    def matrix(self, number: int) -> np.ndarray:
        """The difference of one matrix, in float32."""
        found = self._difference.rows(number * self._rows, (number + 1) * self._rows)
        if nonfinite_count(found):
            raise NonFiniteError(f"weight {self.name}: one of the models has NaN or Inf there")
        return found.T if self._turned else found

    def delta(self, how: How) -> tuple[LoraDelta, Loss] | None:
        """The update and what it loses; None where nothing changed.

        Of experts all have one rank. With a tolerance, the rank that is needed is found by doubling.
        """
        rank = max(how.cut.ranks, default=_FIRST)
        while True:
            parts = [self._svd(number, rank, how) for number in range(self.count)]
            errors, norm = relative_errors(parts)
            if norm == 0:
                return None
            most = max(len(part.sigma) for part in parts)
            reached = how.cut.tolerance is None or errors[most] <= how.cut.tolerance
            if how.cut.ranks or reached or most < rank:
                break
            rank *= 2
        kept = min(how.cut.rank(errors), most)
        return self._put_together([part.truncated(kept) for part in parts]), Loss(kept, norm, float(errors[kept]))

    def _svd(self, number: int, rank: int, how: How) -> Svd:
        matrix = self.matrix(number)
        if not matrix.any():
            return Svd(np.zeros(0), lambda _: (np.zeros((matrix.shape[0], 0)), np.zeros((0, matrix.shape[1]))))
        if how.exact:
            return whole(matrix, rank)
        # Of its own for each weight, so that one alone is what it is among others.
        rng = np.random.default_rng([how.seed, zlib.crc32(self.name.encode()), number])
        return leading(matrix, rank, rng)

    def _put_together(self, parts: list[Matrix]) -> LoraDelta:
        """``B = U √S`` and ``A = √S Vᵀ`` at scaling 1, filled up with zeros where an expert has fewer."""
        rank = max(part.rank for part in parts)
        (out, n_in) = parts[0].shape
        a, b = np.zeros((self.count, rank, n_in), np.float32), np.zeros((self.count, out, rank), np.float32)
        for n, part in enumerate(parts):
            a[n, : part.rank], b[n, :, : part.rank] = part.a, part.b
        if self.kind == "conv":
            kernel = self.shape[2:]
            a, b = a.reshape(rank, self.shape[1], *kernel), b.reshape(out, rank, *(1 for _ in kernel))
        elif self.kind != "experts":
            a, b = a[0], b[0]
        label = f"extracted {self.name}"
        return LoraDelta(_held(a, f"{label} A"), _held(b, f"{label} B"), 1.0, self.kind)


def _held(array: np.ndarray, label: str) -> Factor:
    return Factor(array.shape, array.dtype, lambda: array, label)
