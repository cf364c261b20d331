"""Curves: singular values, and what a bake loses at every rank; a sentence where there is one number only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorastack.algebra.measure import AdapterMeasure
from lorastack.report import words
from lorastack.report.figures import COLOURS, Drawing, decades, framed, go, label, ticks
from lorastack.report.findings import Findings
from lorastack.report.places import Grid

#: More lines cannot be told apart.
_LINES = 12


def spectrum(one: AdapterMeasure, names: Sequence[str], grid: Grid) -> Drawing | str:
    """How many directions an adapter uses: singular values, the root mean square over the layers, for each module."""
    found = _strongest(_spectra(one, names, grid))
    if not found:
        return "it changes nothing."
    if max(map(len, found.values())) == 1:
        each = ", ".join(f"{words.number(values[0])} ({module})" for module, values in found.items())
        return f"rank 1, so each update has one singular value: {each}."
    lines = [
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=values,
            name=label(module),
            mode="lines+markers",
            meta=n % COLOURS,
            marker={"size": 5, "symbol": n % 40},
            line={"dash": "solid" if n < COLOURS else "dot"},
            hovertemplate="%{x}: %{y:.3g}",
        )
        for module, values in found.items()
        for n in (grid.modules.index(module),)  # a module looks the same with every adapter
    ]
    most = max(map(len, found.values()))
    plot = framed(lines, 300, showlegend=True, legend={"orientation": "h", "y": -0.15, "yanchor": "top"})
    plot.update_xaxes(tickvals=ticks(1, most))
    known = [value for values in found.values() for value in values if value > 0]
    marks = decades(min(known), max(known)) if known else []
    plot.update_yaxes(type="log", tickvals=marks, ticktext=[f"{mark:g}" for mark in marks])
    ends = {module: (words.number(v[0]), words.number(v[-1]), len(v)) for module, v in found.items()}
    falls = [f"{module} from {first} to {last} over {count}" for module, (first, last, count) in ends.items()]
    rows = [[str(n + 1), *(words.number(v[n]) if n < len(v) else "" for v in found.values())] for n in range(most)]
    return Drawing(plot, f"Singular values fall: {'; '.join(falls)}.", ["number", *found], rows)


def losses(found: Findings) -> Drawing | str:
    """What a bake loses at every rank, with the foretold ones marked."""
    if found.exact < 3:
        lost = "".join(f"A bake at rank 1 loses {words.percent(error)}. " for error in found.curve[1 : found.exact])
        return f"{lost}A bake at rank {found.exact} loses nothing."
    line = go.Scatter(
        x=list(range(len(found.curve))),
        y=list(found.curve),
        mode="lines",
        meta=0,
        hovertemplate="rank %{x}: %{y:.2%}<extra></extra>",
    )
    lossy = [bake for bake in found.bakes if bake.rank < found.exact]
    marks = go.Scatter(
        x=[bake.rank for bake in lossy],
        y=[bake.error for bake in lossy],
        mode="markers+text",
        text=[words.percent(bake.error) for bake in lossy],
        textposition="top right",
        marker={"size": 9},
        meta=5,
        cliponaxis=False,
        hovertemplate="rank %{x}: %{y:.2%}<extra></extra>",
    )
    plot = framed([line, marks], 300, showlegend=False)
    plot.update_xaxes(title="rank", range=[0, 1.1 * found.exact], tickvals=ticks(0, found.exact))
    plot.update_yaxes(title="relative error", tickformat=".0%", rangemode="tozero")
    # With no usual rank below, the one in the middle is said.
    told = [bake.rank for bake in lossy] or [found.exact // 2]
    at = ", ".join(f"{words.percent(found.curve[rank])} at rank {rank}" for rank in told)
    said = f"The error falls from 100 % at rank 0 over {at} to nothing at rank {found.exact}."
    rows = [[str(rank), words.percent(error)] for rank, error in enumerate(found.curve)]
    return Drawing(plot, said, ["rank", "relative error"], rows)


def _spectra(one: AdapterMeasure, names: Sequence[str], grid: Grid) -> dict[str, list[float]]:
    """Module -> its singular values, the root mean square over the layers."""
    at = {weight.name: weight.spectrum for weight in one.weights if weight.spectrum}
    found: dict[str, list[float]] = {}
    for module in grid.modules:
        cells = [n for layer in grid.layers for n in grid.cells.get((module, layer), [])]
        if spectra := [at[names[n]] for n in cells if names[n] in at]:
            squares = np.zeros(max(map(len, spectra)))
            for values in spectra:
                squares[: len(values)] += np.square(values)
            found[module] = np.sqrt(squares / len(spectra)).tolist()
    return found


def _strongest(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Those with the largest singular values, in the order they came."""
    order = sorted(found, key=lambda module: -found[module][0])[:_LINES]
    return {module: values for module, values in found.items() if module in order}
