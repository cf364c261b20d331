"""SVG: one figure as a picture of its own, in light and in dark, with nothing to run and nothing to fetch.

It has paper of its own, so that it can be read wherever it is put. It draws what the page draws, as far as the report's
figures go: coloured cells, and lines with marks.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lorastack.errors import printable
from lorastack.report.colours import DARK, LIGHT, Scheme, ink_on, mixed
from lorastack.report.figures import COLOURS, Drawing, label

_WIDTH, _TOP = 640, 34
#: A letter's width where nobody can measure it, a line's height, and room around.
_LETTER, _LINE, _GAP = 7.4, 18, 8
#: Colours of a scale.
_STEPS = 64
_FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
#: What XML has no place for, beside controls.
_NO_XML = re.compile("[\ufffe\uffff]")


class _Frame(NamedTuple):
    """Where the figure's own area lies."""

    left: float
    top: float
    width: float
    height: float


def svg(title: str, drawing: Drawing) -> str:
    """The picture as text; numbers are those of the drawing, names are texts whatever they hold."""
    plot = drawing.plot
    first = plot.data[0]
    parts, height = _cells(first, plot.layout) if first.type == "heatmap" else _lines(plot.data, plot.layout)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" '
        f'height="{height:g}" role="img">\n<title>{_xml(title)}</title>\n<desc>{_xml(drawing.said)}</desc>\n'
        f"<style>\n{_styles(body)}</style>\n"
        f'<rect class="paper" width="{_WIDTH}" height="{height:g}" rx="8"/>\n'
        f"{_text(_GAP + 4, 22, label(title, 68), 'start', 'head')}\n{body}\n</svg>\n"
    )


def _cells(heat: Any, layout: Any) -> tuple[list[str], float]:
    """Coloured cells with their rows and columns, and the key of the colours."""
    rows, columns = len(heat.z), len(heat.z[0])
    names = list(layout.yaxis.ticktext)
    left = 2 * _GAP + _LETTER * max(len(html.unescape(name)) for name in names)
    frame = _Frame(left, _TOP, _WIDTH - left - 76, layout.height - 90)
    wide, high = frame.width / columns, frame.height / rows
    longest = max(len(text) for row in heat.text for text in row)
    room = wide >= _GAP + _LETTER * longest and high >= _LINE - 3
    parts = []
    for y, row in enumerate(heat.z):
        middle = frame.top + (y + 0.5) * high
        parts.append(_text(frame.left - 6, middle + 4, names[y], "end"))
        for x, value in enumerate(row):
            if value is None:
                continue
            step = _step(value, heat.zmin, heat.zmax)
            at = frame.left + x * wide
            colour = f"{heat.meta[:1]}{step}"
            parts.append(
                f'<rect class="c{colour}" x="{at + 0.5:.1f}" y="{middle - high / 2 + 0.5:.1f}" '
                f'width="{wide - 1:.1f}" height="{high - 1:.1f}"/>'
            )
            if room:
                parts.append(_text(at + wide / 2, middle + 4, heat.text[y][x], "middle", f"k{colour}"))
    marks = [(frame.left + (n + 0.5) * wide, text) for n, text in _ticks(layout.xaxis)]
    below = frame.top + frame.height
    parts += [_text(x, below + _LINE - 3, text, "middle") for x, text in marks]
    if layout.xaxis.title.text:
        parts.append(_text(frame.left + frame.width / 2, below + 2 * _LINE - 3, layout.xaxis.title.text, "middle"))
    return [*parts, *_key(heat, frame)], below + 2 * _LINE + _GAP


def _key(heat: Any, frame: _Frame) -> Iterator[str]:
    """The colours from the low end to the high one, and five numbers."""
    left, high = frame.left + frame.width + 14, frame.height / _STEPS
    for step in range(_STEPS):
        y = frame.top + frame.height - (step + 1) * high
        # A little over the next one, so that no paper shines through.
        yield f'<rect class="c{heat.meta[:1]}{step}" x="{left:.1f}" y="{y:.2f}" width="10" height="{high + 0.4:.2f}"/>'
    for n in range(5):
        value = heat.zmin + (heat.zmax - heat.zmin) * n / 4
        y = frame.top + frame.height * (1 - n / 4)
        yield _text(left + 15, min(max(y + 4, frame.top + 9), frame.top + frame.height),
                    _number(value, heat.colorbar.tickformat))  # fmt: skip


def _lines(traces: Sequence[Any], layout: Any) -> tuple[list[str], float]:
    """Lines and marks over two axes, with the names of lines below."""
    log = layout.yaxis.type == "log"
    xs, ys = [float(x) for one in traces for x in one.x], [float(y) for one in traces for y in one.y]
    ticks = _ticks(layout.yaxis) or [(at, _number(at, layout.yaxis.tickformat)) for at in _round_steps(max(ys))]
    if log:  # decades are whole, and most of one may lie beside: from the mark below to the mark above
        known = [y for y in ys if y > 0]
        bottom = max(at for at, _ in ticks if at <= min(known) * (1 + 1e-9))
        top = min(at for at, _ in ticks if at >= max(known) * (1 - 1e-9))
        ticks = [(at, text) for at, text in ticks if bottom <= at <= top]
        low, high = math.log10(bottom), math.log10(top)
    else:
        low, high = 0.0, max([*ys, *(at for at, _ in ticks)])
    left = 2.5 * _GAP + _LETTER * max([len(text) for _, text in ticks], default=1)
    frame = _Frame(left, _TOP + 8, _WIDTH - left - 24, 220)
    first, last = layout.xaxis.range or (min(xs), max(xs))

    def x_of(value: float) -> float:
        return frame.left + frame.width * ((value - first) / (last - first) if last > first else 0.5)

    def y_of(value: float) -> float:
        at = math.log10(value) if log else value
        return frame.top + frame.height * (1 - ((at - low) / (high - low) if high > low else 0.5))

    below, right = frame.top + frame.height, frame.left + frame.width
    parts = []
    for at, text in ticks:
        y = y_of(at)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(_text(frame.left - 6, y + 4, text, "end"))
    parts += [_text(x_of(at), below + _LINE - 1, text, "middle") for at, text in _ticks(layout.xaxis)]
    below += _LINE
    if layout.xaxis.title.text:
        below += _LINE
        parts.append(_text(frame.left + frame.width / 2, below - 2, layout.xaxis.title.text, "middle"))
    for one in traces:
        points = [(x_of(float(x)), y_of(float(y))) for x, y in zip(one.x, one.y, strict=True) if y > 0 or not log]
        parts += _trace(one, points)
    legend, below = _legend(traces, below + _LINE) if layout.showlegend else ([], below)
    return [*parts, *legend], below + _GAP


def _trace(one: Any, points: list[tuple[float, float]]) -> Iterator[str]:
    dots = ' stroke-dasharray="2 4"' if one.line.dash == "dot" else ""
    if "lines" in one.mode and len(points) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<path class="l{one.meta}" d="M{path}"{dots}/>'
    if "markers" in one.mode:
        for x, y in points:
            yield f'<circle class="m{one.meta}" cx="{x:.1f}" cy="{y:.1f}" r="{(one.marker.size or 6) / 2:g}"/>'
    if "text" in one.mode:
        for (x, y), text in zip(points, one.text, strict=True):
            yield _text(x + 6, y - 6, text)


def _legend(traces: Sequence[Any], top: float) -> tuple[list[str], float]:
    parts: list[str] = []
    x, y = 2.0 * _GAP, top
    for one in traces:
        wide = 34 + _LETTER * len(html.unescape(one.name))
        if x + wide > _WIDTH and x > 2 * _GAP:
            x, y = 2.0 * _GAP, y + _LINE
        parts += _trace(one, [(x, y), (x + 20, y)])
        parts.append(_text(x + 26, y + 4, one.name))
        x += wide + _GAP
    return parts, y + _GAP


def _ticks(axis: Any) -> list[tuple[float, str]]:
    """Where an axis is marked, and as what."""
    values = [] if axis.tickvals is None else list(axis.tickvals)
    texts = [f"{value:g}" for value in values] if axis.ticktext is None else list(axis.ticktext)
    return [(float(value), str(text)) for value, text in zip(values, texts, strict=True)]


def _round_steps(top: float) -> list[float]:
    """0 and some round numbers, the last at or above ``top``."""
    if not top > 0:
        return [0.0]
    rough = top / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [n * step for n in range(math.ceil(top / step - 1e-9) + 1)]


def _step(value: float, low: float, high: float) -> int:
    share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
    return round(min(1.0, max(0.0, share)) * (_STEPS - 1))


def _number(value: float, tick_format: str | None) -> str:
    return (f"{value:.0%}" if tick_format == ".0%" else f"{value:.3g}").replace("-", "−")


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    """A text of the figure, which has it as HTML."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_xml(html.unescape(text))}</text>'


def _xml(text: str) -> str:
    return html.escape(printable(_NO_XML.sub("?", " ".join(text.split()))))


def _styles(body: str) -> str:
    """The styles of both schemes, of cells those that are there."""
    used = sorted(set(re.findall(r'class="([ck][ds]\d+)"', body)))
    light, dark = ("".join(_of_scheme(scheme, used)) for scheme in (LIGHT, DARK))
    fixed = (
        f"svg {{ font: {_FONT}; }}\n.head {{ font-weight: 600; font-size: 14px; }}\n"
        "path { fill: none; stroke-width: 2; }\n.grid { stroke-width: 1; }\n"
    )
    return f"{fixed}{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _of_scheme(scheme: Scheme, used: Sequence[str]) -> Iterator[str]:
    yield f".paper {{ fill: {scheme.paper}; }}\ntext {{ fill: {scheme.ink}; }}\n.grid {{ stroke: {scheme.line}; }}\n"
    for n, colour in enumerate(scheme.lines[:COLOURS]):
        yield f".l{n} {{ stroke: {colour}; }}\n.m{n} {{ fill: {colour}; }}\n"
    for one in used:
        colour = mixed(scheme.diverging if one[1] == "d" else scheme.sequential, int(one[2:]) / (_STEPS - 1))
        yield f".{one} {{ fill: {colour if one[0] == 'c' else ink_on(colour)}; }}\n"
