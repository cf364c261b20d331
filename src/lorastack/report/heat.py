"""Heat: numbers by module and layer, or by pair, as coloured cells; a sentence where there is one number only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorastack.algebra.compare import MATTERS, Comparison
from lorastack.algebra.measure import AdapterMeasure
from lorastack.report import words
from lorastack.report.figures import Drawing, bar, framed, go, label, ticks
from lorastack.report.places import NO_LAYER, Grid

Cells = list[list[float | None]]


def norms(one: AdapterMeasure, names: Sequence[str], grid: Grid, top: float) -> Drawing | str:
    """Where an adapter changes the model, and how much: its norm at each place, relative to the base's if known.

    ``top`` is the end of the colour scale, one for all adapters so that they can be compared.
    """
    relative = one.relative is not None
    written = words.percent if relative else words.number
    z = norm_cells(one, names, grid)
    known = _known(z, grid)
    if len(known) < 2:
        if not known:
            return "it changes nothing."
        size = f"{written(known[0][0])} of the base's weight" if relative else f"a norm of {written(known[0][0])}"
        return f"{size}, at {known[0][1]}."
    (low, least), (high, most) = min(known), max(known)
    said = f"{len(known)} places, from {written(low)} at {least} to {written(high)} at {most}."
    return _cells(grid, z, written, (0.0, top), "sequential", said, ".0%" if relative else "")


def norm_cells(one: AdapterMeasure, names: Sequence[str], grid: Grid) -> Cells:
    """The norm at each place, relative to the base's where that is known."""
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

    return grid.values(value)


def norm_top(adapters: Sequence[AdapterMeasure], names: Sequence[str], grid: Grid) -> float:
    """The largest value of all adapters' heat maps."""
    found = [v for one in adapters for row in norm_cells(one, names, grid) for v in row if v is not None]
    return max([v for v in found if math.isfinite(v)], default=0.0) or 1.0


def cosines(cosine: np.ndarray, grid: Grid, top: float) -> Drawing | str:
    """Where two adapters pile up (above 0) and where they cancel (below 0); ``cosine`` has one for each weight."""

    def value(cell: list[int]) -> float | None:
        known = cosine[cell][np.isfinite(cosine[cell])]
        return float(known.mean()) if known.size else None

    # Modules that the two do not share have nothing to say.
    used = [m for m in grid.modules if any(value(grid.cells.get((m, at), [])) is not None for at in grid.layers)]
    grid = grid._replace(modules=used)
    z = grid.values(value)
    known = _known(z, grid)
    if not known:
        return "they change no weight in common."
    if len(known) == 1:
        return f"{words.cosine(known[0][0])}, at {known[0][1]}."
    (low, least), (high, most) = min(known), max(known)
    down, up = sum(one < -MATTERS for one, _ in known), sum(one > MATTERS for one, _ in known)
    said = (
        f"{len(known)} places, from {words.cosine(low)} at {least} to {words.cosine(high)} at {most}; "
        f"below −{MATTERS} at {down}, above {MATTERS} at {up}."
    )
    return _cells(grid, z, words.cosine, (-top, top), "diverging", said)


def similarity(found: Comparison) -> Drawing | str:
    """The cosine of every pair."""
    names = list(found.names)
    values = [[float(v) if math.isfinite(v) else None for v in row] for row in found.cosine]
    pairs = [(v, f"{names[i]} and {names[j]}") for i, row in enumerate(values) for j, v in enumerate(row[:i])
             if v is not None]  # fmt: skip
    if len(names) < 3:
        value = float(found.cosine[0, 1])
        return f"The cosine of {names[0]} and {names[1]} is {words.cosine(value)}: {words.of_cosine(value)}."
    said = f"{words.count(len(pairs), 'pair')}."
    if pairs:
        (low, least), (high, most) = min(pairs), max(pairs)
        said = f"{len(pairs)} pairs, from {words.cosine(low)} ({least}) to {words.cosine(high)} ({most})."
    shown = [[words.cosine(math.nan if v is None else v) for v in row] for row in values]
    heat = _heat(values, shown, [[f"{a}, {b}" for b in map(label, names)] for a in map(label, names)], (-1.0, 1.0))
    # By number, since two names may look alike once shortened.
    numbers = [str(n) for n in range(1, len(names) + 1)]
    numbered = [f"{n} {name}" for n, name in zip(numbers, names, strict=True)]
    plot = _framed(heat, max(240, 90 + 26 * len(names)), numbered)
    marked = ticks(0, len(names) - 1) if len(names) > 12 else list(range(len(names)))
    plot.update_xaxes(tickvals=marked, ticktext=[numbers[n] for n in marked])
    return Drawing(plot, said, ["", *names], [[name, *row] for name, row in zip(names, shown, strict=True)])


def _known(z: Cells, grid: Grid) -> list[tuple[float, str]]:
    """Every finite number with the place it is at."""
    return [
        (value, _place(module, layer))
        for module, row in zip(grid.modules, z, strict=True)
        for layer, value in zip(grid.layers, row, strict=True)
        if value is not None and math.isfinite(value)
    ]


def _place(module: str, layer: str) -> str:
    return module if layer == NO_LAYER else f"{module}, layer {layer}"


def _cells(
    grid: Grid,
    z: Cells,
    written: Callable[[float | None], str] | Callable[[float], str],
    ends: tuple[float, float],
    colours: str,
    said: str,
    tick_format: str = "",
) -> Drawing:
    shown = [["" if v is None else written(v) for v in row] for row in z]
    places = [[_place(label(module, 26), layer) for layer in grid.layers] for module in grid.modules]
    heat = _heat(z, shown, places, ends, colours, tick_format)
    plot = _framed(heat, 90 + max(24 * len(grid.modules), 80), grid.modules)
    last = len(grid.layers) - 1
    columns = ticks(0, last)
    if grid.layers[last] == NO_LAYER:
        columns = [*(n for n in columns if n < last - last // 10), last]
    plot.update_xaxes(tickvals=columns, ticktext=[grid.layers[n] for n in columns], title="layer")
    # The longer side goes down the page.
    if len(grid.layers) > len(grid.modules):
        turned = [[layer, *column] for layer, column in zip(grid.layers, zip(*shown, strict=True), strict=True)]
        return Drawing(plot, said, ["layer", *grid.modules], turned)
    rows = [[module, *row] for module, row in zip(grid.modules, shown, strict=True)]
    return Drawing(plot, said, ["module", *(f"layer {layer}" for layer in grid.layers)], rows)


def _heat(
    z: Cells,
    shown: list[list[str]],
    places: list[list[str]],
    ends: tuple[float, float],
    colours: str = "diverging",
    tick_format: str = "",
) -> Any:
    return go.Heatmap(
        z=z,
        x=list(range(len(z[0]))),
        y=list(range(len(z))),
        text=shown,
        customdata=places,
        zmin=ends[0],
        zmax=ends[1],
        xgap=1,
        ygap=1,
        meta=colours,
        hovertemplate="%{customdata}: %{text}<extra></extra>",
        colorbar=bar(tick_format),
    )


def _framed(heat: Any, height: int, rows: Sequence[str]) -> Any:
    """Rows by number, since two long names may look alike once shortened; on a phone they are shorter."""
    plot = framed(heat, height, showlegend=False, meta={"short": [label(name, 12) for name in rows]})
    names = [label(name, 26) for name in rows]
    plot.update_xaxes(range=[-0.5, len(heat.x) - 0.5], tickangle=0, showgrid=False)
    plot.update_yaxes(range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))), ticktext=names, showgrid=False)
    return plot
