"""Verify: what was written does what the stack does, tensor by tensor, as the finished files say.

For random x: ||(W' - W) x - delta x|| / ||delta x||, with delta x through the factors, beside what was estimated.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from lorastack.base.model import Part
from lorastack.base.rows import Rows
from lorastack.errors import Problems
from lorastack.files import OutputError
from lorastack.merging.stream import Merging
from lorastack.merging.survival import Survival
from lorastack.merging.update import Block

#: Random vectors, side by side. An update of rank 1 is met by few of them at full length, and by few not at all.
_COUNT = 16
#: More than this times the error that was estimated is another error than rounding; and rounding by itself.
_FACTOR, _FLOOR = 1.5, 1e-4


class Verified(NamedTuple):
    """What was found of one tensor, and what had been estimated; ``relative`` is ||(W' - W - delta) x|| / ||delta||.

    The latter does not depend on how much of delta the random x meet, and so tells rounding from another error.
    """

    weight: str
    error: float
    estimated: float
    relative: float


def verify(merging: Merging, written: Part, survival: Survival) -> Verified:
    """Read a tensor of the finished files back, and hold it against base and adapters."""
    update = merging.update
    new = Rows(written, update.shape[2])
    rng = np.random.default_rng(zlib.crc32(update.weight.encode()))
    x = rng.standard_normal((update.shape[2], _COUNT)).astype(merging.wide)
    lost = total = whole = 0.0
    for at in update.blocks():
        old = merging.sum.base_rows(at)
        if update.as_saved:
            old = merging.back(merging.rounded(at, old))
        start = at.matrix * update.shape[1]
        moved = (new.read(start + at.first, start + at.stop, merging.wide) - old) @ x
        wanted, square = _through_factors(merging, at, old, x)
        total += float(np.vdot(wanted, wanted))
        whole += square
        moved -= wanted
        lost += float(np.vdot(moved, moved))
    error, relative = (float(np.sqrt(lost / (one or 1.0))) for one in (total, _COUNT * whole))
    return Verified(update.weight, error, survival.error, relative)


def refuse_worse(found: list[Verified]) -> None:
    """OutputError that lists the tensors that are further off than rounding explains."""
    problems = Problems("what was written is not what was to be written")
    for weight, _, estimated, relative in found:
        if not relative <= _FACTOR * estimated + _FLOOR:
            what = f"the error is {relative:.2g}, expected {estimated:.2g}"
            problems.add(f"weight {weight}: {what}; the disk may be failing")
    problems.raise_any(OutputError)


def _through_factors(merging: Merging, at: Block, old: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """delta x of some rows, and ||delta||^2 of them; DoRA's, biases and rows that are put in whole are dense."""
    update = merging.update
    if merging.sum.dora or update.added or update.tokens is not None:
        delta = merging.sum.new_rows(at) - old
        return delta @ x, float(np.vdot(delta, delta))
    if not update.terms:
        return np.zeros((old.shape[0], _COUNT), merging.wide), 0.0
    _, left, right = merging.sum.parts(at, old)
    square = np.vdot(left.T.astype(np.float64) @ left, right.astype(np.float64) @ right.T)
    return left @ (right @ x), float(square)
