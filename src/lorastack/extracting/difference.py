"""Difference: one weight of a fine-tuned model less the base's, in float32, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lorastack.base.model import Stored
from lorastack.base.rows import Rows
from lorastack.base.scratch import Scratch

#: Numbers that are read at a time.
_BLOCK = 1 << 20


class Side:
    """One model's weight as rows of ``columns`` numbers, whatever tensors it is stored in."""

    def __init__(self, place: Stored, columns: int) -> None:
        self._parts = [Rows(part, columns) for part in place.parts]
        #: Of a weight that is no tensor of the files as it is, such as one that is kept turned over.
        self._read = None if place.parts else place.read
        self._columns = columns

    def blocks(self, first: int, stop: int, scratch: Scratch) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, some rows in float32) from ``first`` on, in memory that is used again."""
        if self._read is not None:
            yield first, self._read().reshape(-1, self._columns)[first:stop].astype(np.float32)
            return
        start = 0
        for part in self._parts:
            begin, end = max(first - start, 0), min(stop - start, part.count)
            step = max(1, _BLOCK // part.columns)
            for n in range(begin, end, step):
                yield start + n, part.read(n, min(n + step, end), np.float32, scratch)
            start += part.count


class Difference:
    """``finetuned - base`` of a weight ``[..., columns]`` that both have in one shape.

    Nothing is read before `rows`, and nothing is kept.
    """

    def __init__(self, finetuned: Stored, base: Stored, shape: tuple[int, ...], columns: int | None = None) -> None:
        self.columns = columns or (shape[-1] if shape else 1)
        self.count = math.prod(shape) // self.columns if self.columns else 0
        self._finetuned, self._base = Side(finetuned, self.columns), Side(base, self.columns)

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Some rows, ``[stop - first, columns]`` in float32: one such array is all that is in memory."""
        found, scratch = np.empty((stop - first, self.columns), np.float32), Scratch()
        for at, block in self._finetuned.blocks(first, stop, scratch):
            found[at - first : at - first + len(block)] = block
        with np.errstate(invalid="ignore", over="ignore"):  # Inf less Inf: who asks looks for NaN
            for at, block in self._base.blocks(first, stop, scratch):
                found[at - first : at - first + len(block)] -= block
        return found

    def squares(self) -> tuple[float, float]:
        """The squared norms of the difference and of the base's weight."""
        changed = before = 0.0
        step, scratch = max(1, _BLOCK // max(1, self.columns)), Scratch()
        for first in range(0, self.count, step):
            stop = min(first + step, self.count)
            block = self.rows(first, stop).astype(np.float64)
            changed += float(np.vdot(block, block))
            for _, own in self._base.blocks(first, stop, scratch):
                wide = own.astype(np.float64)
                before += float(np.vdot(wide, wide))
        return changed, before
