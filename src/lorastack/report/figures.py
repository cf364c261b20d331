"""Figures: one function for each; colours that depend on light or dark are set by the page's script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorastack.algebra.compare import Comparison
from lorastack.algebra.measure import AdapterMeasure
from lorastack.errors import require
from lorastack.report.findings import Findings
from lorastack.report.places import NO_LAYER, Grid

go: Any = require("plotly.graph_objects", "report")

#: In cells there is room for numbers while there are no more columns than these; the page's script takes them out where
#: it is narrow.
_ROOM = 12
#: Hues that tell apart also for colour-blind eyes, on white and on black (after Okabe and Ito).
COLOURS = ("#2B83C6", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def label(name: str, most: int = 22) -> str:
    """A name as plotly shows it: nothing in it is read as HTML, and the middle of a long one is left out."""
    if len(name) > most:
        name = f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"
    return html.escape(name)


def norms(one: AdapterMeasure, names: Sequence[str], grid: Grid, top: float) -> Any:
    """Where an adapter changes the model, and how much: its norm at each place, relative to the base's if known.

    ``top`` is the end of the colour scale, one for all adapters so that they can be compared.
    """
    at = {weight.name: weight for weight in one.weights}
    relative = one.relative is not None

    def value(cell: list[int]) -> float | None:
        found = [at[names[n]] for n in cell if names[n] in at]
        if not found:
            return None
        norm = math.hypot(*(weight.norm for weight in found))
        if not relative:
            return norm
        # The weights that share a cell have one norm together, and so have the base's.
        base = math.hypot(*(weight.norm / weight.relative for weight in found if weight.relative))
        return norm / base if base else 0.0

    shown = "%{z:.2%}" if relative else "%{z:.3g}"
    return _cells(grid, grid.values(value), shown, 0.0, top, "sequential", ".0%" if relative else "")


def norm_top(adapters: Sequence[AdapterMeasure], names: Sequence[str], grid: Grid) -> float:
    """The largest value of all adapters' heat maps."""
    found = [v for one in adapters for row in norms(one, names, grid, 1.0).data[0].z for v in row if v is not None]
    return max([v for v in found if math.isfinite(v)], default=0.0) or 1.0


def cosines(cosine: np.ndarray, grid: Grid, top: float) -> Any:
    """Where two adapters pile up (above 0) and where they cancel (below 0); ``cosine`` has one for each weight."""

    def value(cell: list[int]) -> float | None:
        known = cosine[cell][np.isfinite(cosine[cell])]
        return float(known.mean()) if known.size else None

    # Modules that the two do not share have nothing to say.
    used = [m for m in grid.modules if any(value(grid.cells.get((m, at), [])) is not None for at in grid.layers)]
    grid = grid._replace(modules=used)
    return _cells(grid, grid.values(value), "%{z:.2f}", -top, top, "diverging")


def similarity(found: Comparison) -> Any:
    """The cosine of every pair."""
    names = [label(name, 16) for name in found.names]
    values = [[float(v) if math.isfinite(v) else None for v in row] for row in found.cosine]
    heat = go.Heatmap(
        z=values,
        x=list(range(len(names))),
        y=list(range(len(names))),
        customdata=[[f"{a}, {b}" for b in names] for a in names],
        zmin=-1,
        zmax=1,
        zmid=0,
        xgap=2,
        ygap=2,
        meta="diverging",
        texttemplate="%{z:.2f}" if len(names) <= _ROOM else None,
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        colorbar=_bar(),
    )
    # By number, since two names may look alike once shortened.
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    figure = _figure(heat, max(240, 90 + 26 * len(names)))
    figure.update_xaxes(**ticks, tickangle=0 if len(names) * max(map(len, names)) <= 24 else -40)
    figure.update_yaxes(**ticks, autorange="reversed")
    return figure


def spectrum(one: AdapterMeasure, names: Sequence[str], grid: Grid) -> Any:
    """How many directions an adapter uses: singular values, the root mean square over the layers, for each module."""
    at = {weight.name: weight.spectrum for weight in one.weights if weight.spectrum}
    modules: dict[str, list[tuple[float, ...]]] = {}
    for module in grid.modules:
        cells = [n for layer in grid.layers for n in grid.cells.get((module, layer), [])]
        if spectra := [at[names[n]] for n in cells if names[n] in at]:
            modules[module] = spectra
    lines = []
    for module, spectra in _most(modules):
        n = grid.modules.index(module)
        squares = np.zeros(max(map(len, spectra)))
        for values in spectra:
            squares[: len(values)] += np.square(values)
        y = np.sqrt(squares / len(spectra)).tolist()
        lines.append(
            go.Scatter(
                x=list(range(1, len(y) + 1)),
                y=y,
                name=label(module),
                mode="lines+markers",
                marker={"size": 5, "symbol": n % 40},
                line={"color": COLOURS[n % len(COLOURS)], "dash": "solid" if n < len(COLOURS) else "dot"},
                hovertemplate="%{x}: %{y:.3g}",
            )
        )
    figure = _figure(lines, 300, showlegend=True, legend={"orientation": "h", "y": -0.15, "yanchor": "top"})
    figure.update_xaxes(tickvals=_ticks(1, max([len(line.y) for line in lines], default=1)))
    known = [y for line in lines for y in line.y if y > 0]
    marks = _decades(min(known), max(known)) if known else []
    figure.update_yaxes(type="log", tickvals=marks, ticktext=[f"{mark:g}" for mark in marks])
    return figure


def losses(found: Findings) -> Any:
    """What a bake loses at every rank, with the usual ones marked."""
    line = go.Scatter(
        x=list(range(len(found.curve))),
        y=list(found.curve),
        mode="lines",
        name="every rank",
        line={"color": COLOURS[0]},
        hovertemplate="rank %{x}: %{y:.2%}<extra></extra>",
    )
    usual = [bake for bake in found.bakes if bake.rank < found.exact]
    marks = go.Scatter(
        x=[bake.rank for bake in usual],
        y=[bake.error for bake in usual],
        mode="markers+text",
        name="usual ranks",
        text=[f"{bake.error:.1%}" for bake in usual],
        textposition="top right",
        marker={"size": 9, "color": COLOURS[5]},
        cliponaxis=False,
        hovertemplate="rank %{x}: %{y:.2%}<extra></extra>",
    )
    figure = _figure([line, marks], 300, showlegend=False)
    figure.update_xaxes(title="rank", range=[0, 1.1 * found.exact], tickvals=_ticks(0, found.exact))
    figure.update_yaxes(title="relative error", tickformat=".0%", rangemode="tozero")
    return figure


def _most(modules: dict[str, list[tuple[float, ...]]]) -> list[tuple[str, list[tuple[float, ...]]]]:
    """The twelve with the largest singular values: more lines cannot be told apart."""
    order = sorted(modules, key=lambda module: -max(values[0] for values in modules[module]))[:12]
    return [(module, spectra) for module, spectra in modules.items() if module in order]


def _cells(
    grid: Grid, z: list[list[float | None]], shown: str, low: float, high: float, colours: str, ticks: str = ""
) -> Any:
    names = [label(module, 26) for module in grid.modules]
    heat = go.Heatmap(
        z=z,
        x=list(range(len(grid.layers))),
        y=list(range(len(z))),
        customdata=[[f"layer {layer}, {module}" for layer in grid.layers] for module in names],
        zmin=low,
        zmax=high,
        xgap=1,
        ygap=1,
        meta=colours,
        texttemplate=shown.replace(".2%", ".1%") if len(grid.layers) <= _ROOM else None,
        hovertemplate="%{customdata}: " + shown + "<extra></extra>",
        colorbar=_bar(ticks),
    )
    figure = _figure(heat, 90 + max(24 * len(names), 80))
    last = len(grid.layers) - 1
    columns = _ticks(0, last)
    if grid.layers[last] == NO_LAYER:
        columns = [*(n for n in columns if n < last - last // 10), last]
    figure.update_xaxes(
        tickvals=columns, ticktext=[grid.layers[n] for n in columns], tickangle=0, title="layer", showgrid=False
    )
    # By number, since two long names may look alike once shortened.
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed", showgrid=False)
    return figure


def _ticks(first: int, last: int) -> list[int]:
    """Whole numbers to mark, at most nine so that a phone has room."""
    step = next(one for one in (1, 2, 4, 5, 10, 20, 25, 50, 100, 250, 1000, 10000) if (last - first) // one <= 8)
    return [first, *(n for n in range(step, last + 1, step) if n - first > step / 2)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around what is shown; whole powers only where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{power}") for power in powers for digit in ((1, 2, 5) if len(powers) <= 4 else (1,))]


def _bar(ticks: str = "") -> dict[str, Any]:
    return {"thickness": 10, "outlinewidth": 0, "tickformat": ticks or None, "nticks": 5, "xpad": 4}


def _figure(traces: Any, height: int, **layout: Any) -> Any:
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        **layout,
    )
    figure.update_xaxes(automargin=True, fixedrange=True, zeroline=False)
    figure.update_yaxes(automargin=True, fixedrange=True, zeroline=False)
    return figure
