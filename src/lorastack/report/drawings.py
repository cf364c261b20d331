"""Drawings: every figure of a report under its title, and the name of its file where it is written alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from lorastack.report import curves, heat
from lorastack.report.figures import Drawing
from lorastack.report.findings import Findings
from lorastack.report.selection import MOST, pairs_of, strongest


class Shown(NamedTuple):
    """A figure, or the sentence that says it; ``file`` goes by the adapters' numbers, since names may be anything."""

    file: str
    title: str
    drawing: Drawing | str


def norms(found: Findings) -> list[Shown]:
    """Where each adapter changes the model; one colour scale for all."""
    comparison, grid = found.comparison, found.grid
    shown = strongest(found)
    top = heat.norm_top([comparison.adapters[n] for n in shown], comparison.weights, grid)
    return [
        Shown(f"norms-{n + 1}.svg", comparison.names[n], heat.norms(one, comparison.weights, grid, top))
        for n in shown
        for one in (comparison.adapters[n],)
    ]


def spectra(found: Findings) -> list[Shown]:
    """The singular values of each adapter."""
    comparison, grid = found.comparison, found.grid
    return [
        Shown(f"spectrum-{n + 1}.svg", comparison.names[n], curves.spectrum(one, comparison.weights, grid))
        for n in strongest(found)
        for one in (comparison.adapters[n],)
    ]


def cosines(found: Findings) -> list[Shown]:
    """How alike the adapters are, all in one; none of a single one."""
    return [Shown("cosines.svg", "Cosine", heat.similarity(found.comparison))] if len(found.adapters) > 1 else []


def conflicts(found: Findings) -> list[Shown]:
    """Where pairs pile up and cancel; none where they are compared over all weights only."""
    comparison = found.comparison
    if comparison.by_weight is None:
        return []
    pairs = [pair for pair in pairs_of(found) if math.isfinite(pair.cosine)][:MOST]
    numbers = [comparison.by_weight.cosine[:, i, j] for i, j, _ in pairs]
    # One scale for all; not narrower than what is worth a look, so that noise does not glow.
    top = max([0.3, *(float(abs(c)) for one in numbers for c in one if math.isfinite(c))])
    return [
        Shown(
            f"conflict-{i + 1}-{j + 1}.svg",
            f"{comparison.names[i]} and {comparison.names[j]}",
            heat.cosines(one, found.grid, top),
        )
        for (i, j, _), one in zip(pairs, numbers, strict=True)
    ]


def losses(found: Findings) -> list[Shown]:
    """What a bake would lose at every rank."""
    return [Shown("losses.svg", "Relative error", curves.losses(found))]
