"""Findings: every number that a page shows, before any of it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorastack.algebra.combine import EXACT
from lorastack.algebra.compare import INTRUDERS, Comparison, compare
from lorastack.algebra.cut import Loss, overall, relative_errors
from lorastack.algebra.entries import entries_of
from lorastack.algebra.lowrank import flat_shape, matrices, svd
from lorastack.base import BaseModel, open_base
from lorastack.core.adapter import LoadedLora
from lorastack.core.stack import LoraStack
from lorastack.hub import told
from lorastack.inspect import Inspection, inspect
from lorastack.recipe import Recipe
from lorastack.report.places import Grid, grid

#: The ranks that a bake is foretold at, as far as they are below the sum's own.
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class BakeLoss:
    """What a bake at one rank would lose; the rank is the most that a weight gets, ``parameters`` those of the file."""

    rank: int
    error: float
    worst: str
    worst_error: float
    parameters: int


@dataclass(frozen=True)
class Measured:
    """What is measured of a stack, each adapter and the pairs, and where its weights lie."""

    comparison: Comparison
    grid: Grid


@dataclass(frozen=True)
class Findings(Measured):
    """All that is known of a stack: each adapter, the pairs, the losses, how to make it again.

    Attributes
    ----------
    bakes
        The losses at those of `RANKS` that are below ``exact``, and there.
    curve
        The relative error at every rank from 0 up to ``exact``.
    exact
        The rank from which on nothing is lost that float32 could tell.
    """

    adapters: tuple[Inspection, ...]
    bakes: tuple[BakeLoss, ...]
    curve: tuple[float, ...]
    exact: int
    base: str | None
    recipe: str


def find(
    stack: LoraStack,
    base: BaseModel | str | Path | None = None,
    intruders: bool = False,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
    allow_mixed_bases: bool = False,
) -> Findings:
    """Measure everything. ``progress`` hears of each weight twice: when compared and when cut.

    The recipe's paths are as seen from ``folder``.
    """
    base = base if isinstance(base, BaseModel) or base is None else open_base(base)
    stack = LoraStack([(one.lora, one.scale) for one in entries_of(stack, base, "report", allow_mixed_bases)])
    total, done = 2 * len(stack.weights), 0

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    recipe = Recipe.of_lora(LoadedLora("report", {}, origin=stack.entries))
    found = compare(
        stack, base, intruders=INTRUDERS if intruders else None, allow_mixed_bases=allow_mixed_bases, progress=step
    )
    curve, bakes, exact = _losses(stack, step)
    return Findings(
        adapters=tuple(inspect(lora) for lora, _ in stack.entries),
        comparison=found,
        grid=grid(found.weights),
        bakes=bakes,
        curve=curve,
        exact=exact,
        # Of a folder only its name: where it lies on this machine is nobody else's business.
        base=None if base is None else told(base.name),
        recipe=(recipe.seen_from(folder, also_absolute=True) if folder else recipe).to_toml(),
    )


def _losses(stack: LoraStack, step: Callable[[], None]) -> tuple[tuple[float, ...], tuple[BakeLoss, ...], int]:
    errors: dict[str, np.ndarray] = {}
    norms: dict[str, float] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for weight in stack.weights:
        terms = list(stack.terms(weight))
        errors[weight], norms[weight] = relative_errors([svd(matrix) for matrix in matrices(terms)])
        shapes[weight] = flat_shape(terms[0][1])
        step()
    exact = max(EXACT.rank(one) for one in errors.values())

    def loss(rank: int) -> BakeLoss:
        at = {w: Loss(rank, norms[w], float(one[min(rank, len(one) - 1)])) for w, one in errors.items()}
        worst = max(at, key=lambda weight: at[weight].error)
        size = sum(n * min(rank, out, n_in) * (out + n_in) for n, out, n_in in shapes.values())
        return BakeLoss(rank, overall(at), worst, at[worst].error, size)

    curve = tuple(loss(rank).error for rank in range(exact + 1))
    return curve, tuple(loss(rank) for rank in (*(rank for rank in RANKS if rank < exact), exact)), exact
