"""Figures: what every drawing shares; colours that depend on light or dark are set by the page's script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lorastack.errors import require

go: Any = require("plotly.graph_objects", "report")

#: Colours of lines and marks that the page's script has.
COLOURS = 6


class Drawing(NamedTuple):
    """A plot, what it shows in words for who cannot see it, and its numbers as a table."""

    plot: Any
    said: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def label(name: str, most: int = 22) -> str:
    """A name as plotly shows it: nothing in it is read as HTML, and the middle of a long one is left out."""
    if len(name) > most:
        name = f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"
    return html.escape(name)


def framed(traces: Any, height: int, **layout: Any) -> Any:
    """A plot without a frame of its own, on the page's paper."""
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


def ticks(first: int, last: int) -> list[int]:
    """Whole numbers to mark, at most nine so that a phone has room."""
    step = next(one for one in (1, 2, 4, 5, 10, 20, 25, 50, 100, 250, 1000, 10000) if (last - first) // one <= 8)
    return [first, *(n for n in range(step, last + 1, step) if n - first > step / 2)]


def decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around what is shown; whole powers only where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{power}") for power in powers for digit in ((1, 2, 5) if len(powers) <= 4 else (1,))]


def bar(tick_format: str = "", title: str = "") -> dict[str, Any]:
    """The key of a colour scale."""
    key = {"thickness": 10, "outlinewidth": 0, "tickformat": tick_format or None, "nticks": 5, "xpad": 4}
    return {**key, "title": {"text": title, "side": "right"}} if title else key
