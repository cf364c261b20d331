"""Drawings: every figure of a report under its title, and the name of its file where it is written alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lorastack.report import curves, heat
from lorastack.report.figures import Drawing
from lorastack.report.findings import Findings, Measured
from lorastack.report.selection import MOST, pairs_of, strongest


class Shown(NamedTuple):
    """A figure, or the sentence that says it, under its title among others of its kind.

    ``file`` goes by the adapters' numbers, since names may be anything; ``alone`` is the title of a picture of its own.
    """

    file: str
    title: str
    alone: str
    drawing: Drawing | str


def norms(found: Measured) -> list[Shown]:
    """Where each adapter changes the model; one colour scale for all."""
    comparison, grid = found.comparison, found.grid
    shown = strongest(found)
    top = heat.norm_top([comparison.adapters[n] for n in shown], comparison.weights, grid)
    share = comparison.adapters[0].relative is not None
    drawn = []
    for n in shown:
        name, one = comparison.names[n], heat.norms(comparison.adapters[n], comparison.weights, grid, top)
        alone = f"Norm of the update, as a share of the base's: {name}" if share else f"Norm of the update: {name}"
        drawn.append(Shown(f"norms-{n + 1}.svg", name, alone, one))
    return drawn


def spectra(found: Measured) -> list[Shown]:
    """The singular values of each adapter."""
    comparison, grid = found.comparison, found.grid
    drawn = []
    for n in strongest(found):
        name, one = comparison.names[n], curves.spectrum(comparison.adapters[n], comparison.weights, grid)
        drawn.append(Shown(f"spectrum-{n + 1}.svg", name, f"Singular values: {name}", one))
    return drawn


def cosines(found: Measured) -> list[Shown]:
    """How alike the adapters are, all in one; none of a single one."""
    if len(found.comparison.adapters) < 2:
        return []
    return [Shown("cosines.svg", "Cosine", "Cosine of every pair", heat.similarity(found.comparison))]


def conflicts(found: Measured) -> list[Shown]:
    """Where pairs pile up and cancel; none where they are compared over all weights only."""
    comparison = found.comparison
    if comparison.by_weight is None:
        return []
    pairs = [pair for pair in pairs_of(found) if math.isfinite(pair.cosine)][:MOST]
    numbers = [comparison.by_weight.cosine[:, i, j] for i, j, _ in pairs]
    # One scale for all; not narrower than what is worth a look, so that noise does not glow.
    top = max([0.3, *(float(abs(c)) for one in numbers for c in one if math.isfinite(c))])
    drawn = []
    for (i, j, _), one in zip(pairs, numbers, strict=True):
        both = f"{comparison.names[i]} and {comparison.names[j]}"
        drawn.append(
            Shown(f"conflict-{i + 1}-{j + 1}.svg", both, f"Cosine: {both}", heat.cosines(one, found.grid, top))
        )
    return drawn


def losses(found: Findings) -> list[Shown]:
    """What a bake would lose at every rank."""
    return [Shown("losses.svg", "Relative error", "Relative error of a bake at a rank", curves.losses(found))]


#: Section of a report -> its figures.
SECTIONS: dict[str, Callable[[Findings], list[Shown]]] = {
    "Where they change the model": norms,
    "Spectra": spectra,
    "How alike they are": cosines,
    "Where they conflict": conflicts,
    "What a bake would lose": losses,
}
