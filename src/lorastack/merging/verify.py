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

#: Random vectors, side by side.
_COUNT = 4
#: More than this times the error that was estimated is another error than rounding; and rounding by itself.
_FACTOR, _FLOOR = 1.5, 1e-4


class Verified(NamedTuple):
    """What was found of one tensor, and what had been estimated."""

    weight: str
    error: float
    estimated: float


def verify(merging: Merging, written: Part, survival: Survival) -> Verified:
    """Read a tensor of the finished files back, and hold it against base and adapters."""
    update = merging.update
    new = Rows(written, update.shape[2])
    rng = np.random.default_rng(zlib.crc32(update.weight.encode()))
    x = rng.standard_normal((update.shape[2], _COUNT)).astype(merging.wide)
    lost = total = 0.0
    for at in update.blocks():
        old = merging.sum.base_rows(at)
        start = at.matrix * update.shape[1]
        moved = (new.read(start + at.first, start + at.stop, merging.wide) - old) @ x
        wanted = _through_factors(merging, at, old, x)
        total += float(np.vdot(wanted, wanted))
        moved -= wanted
        lost += float(np.vdot(moved, moved))
    error = float(np.sqrt(lost / total)) if total else float(np.sqrt(lost))
    return Verified(update.weight, error, survival.error)


def refuse_worse(found: list[Verified]) -> None:
    """OutputError that lists the tensors that are further off than rounding explains."""
    problems = Problems("what was written is not what was to be written")
    for weight, error, estimated in found:
        if not error <= _FACTOR * estimated + _FLOOR:
            problems.add(
                f"weight {weight}: the error is {error:.2g}, expected {estimated:.2g}; the disk may be failing"
            )
    problems.raise_any(OutputError)


def _through_factors(merging: Merging, at: Block, old: np.ndarray, x: np.ndarray) -> np.ndarray:
    """delta x of some rows. Rows that are put in whole, and biases, are what they are."""
    update = merging.update
    if update.added or update.tokens is not None:
        return (merging.sum.new_rows(at) - old) @ x
    if not update.terms:
        return np.zeros((old.shape[0], _COUNT), merging.wide)
    keep, left, right = merging.sum.parts(at, old)
    wanted = left @ (right @ x)
    if keep is None:
        return wanted
    return wanted + (keep * old) @ x - old @ x
