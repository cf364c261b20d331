"""Survival: how much of an update is left once the sum is rounded to the type it is stored in.

Where a type has few digits, most of a small update is rounded away: of one of a percent of the weight bfloat16 loses a
sixth, and a type of four bits nearly all, since a number moves only where it is changed by half a step.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from lorastack.merging.stream import Merging
from lorastack.merging.update import Block

#: Rows of a tensor that are looked at, chosen by its name; of a small one fewer, so that this is a small part of a run.
ROWS, LEAST, PART = 256, 32, 40


class Survival(NamedTuple):
    """``error`` is ||W' - W - delta|| / ||delta||, ``kept`` the part of delta that is in W' - W (its projection).

    ``size`` is ||delta|| / ||W||. W' is as stored, W as the base has it.
    """

    weight: str
    kind: str
    error: float
    kept: float
    size: float


class _Sums:
    """Squares and products over rows: those of some in the type that the sum is computed in, their sums in float64."""

    def __init__(self) -> None:
        self.lost = self.along = self.delta = self.base = 0.0

    def add(self, old: np.ndarray, wanted: np.ndarray, stored: np.ndarray) -> None:
        delta, moved = wanted - old, stored - old
        self.delta += float(np.vdot(delta, delta))
        self.along += float(np.vdot(delta, moved))
        self.base += float(np.vdot(old, old))
        moved -= delta
        self.lost += float(np.vdot(moved, moved))


def estimate(merging: Merging) -> Survival:
    """From a few rows of the tensor, before anything is written."""
    sums = _Sums()
    for at in _sampled(merging):
        old = merging.sum.base_rows(at)
        wanted = merging.sum.new_rows(at, start=old.copy())
        sums.add(old, wanted, merging.back(merging.rounded(at, wanted)))
    return _survival(merging, sums)


def _survival(merging: Merging, sums: _Sums) -> Survival:
    if not sums.delta:
        return Survival(merging.update.weight, merging.kind, 0.0, 1.0, 0.0)
    return Survival(
        merging.update.weight,
        merging.kind,
        float(np.sqrt(sums.lost / sums.delta)),
        sums.along / sums.delta,
        float(np.sqrt(sums.delta / sums.base)) if sums.base else float("inf"),
    )


def _sampled(merging: Merging) -> list[Block]:
    """Rows here and there, the same ones for a name each time; in runs, which cost less to read."""
    matrices, rows, columns = merging.update.shape
    total, run = matrices * rows, max(1, min(16, (1 << 16) // max(columns, 1)))
    count = min(ROWS, max(LEAST, total // PART))
    if total <= count:
        return [Block(matrix, 0, rows) for matrix in range(matrices)]
    rng = np.random.default_rng(zlib.crc32(merging.update.weight.encode()))
    starts = np.sort(rng.choice(total // run, max(1, count // run), replace=False)) * run
    found = []
    for start in starts.tolist():
        matrix, first = divmod(start, rows)
        found.append(Block(matrix, first, min(first + run, rows)))
    return found
