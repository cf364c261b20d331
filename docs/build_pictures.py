"""Draw the figures of benchmarks/RESULTS.md into docs/assets/; with --check only say whether the pictures are of them.

RESULTS.md is the one home of what was measured: a bar or a curve names a table there and a row of it. The pictures
follow the scheme of the page that shows them, light or dark.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "RESULTS.md"
#: A median with its quartiles, as benchmarks/timing.py prints it; quartiles may be missing.
FIGURE = r"([\d.,]+)(?: \(([\d.,]+) to ([\d.,]+)\))?"
STYLE = """<style>
text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #24292f }
.head { font-weight: 600 } .small { font-size: 13px; fill: #57606a }
.bar0, .dot0 { fill: #3f51b5 } .bar1, .dot1 { fill: #b26a00 } .bar2, .dot2 { fill: #6e7781 }
.line0 { stroke: #3f51b5 } .line1 { stroke: #b26a00 } .line2 { stroke: #6e7781 } .line1 { stroke-dasharray: 7 4 }
.line2 { stroke-dasharray: 2 4 } polyline { fill: none; stroke-width: 2.5 }
.rule { stroke: #d0d7de; stroke-width: 1 } .one { stroke: #24292f; stroke-width: 1.5; stroke-dasharray: 4 3 }
.range { stroke: #24292f; stroke-width: 1.5 } .over { fill: #fff; font-weight: 600 }
.box { fill: none; stroke: #8c959f; stroke-width: 1.5 } .flow { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e8ef } .small { fill: #aab1c0 } .over { fill: #1e2129 }
.bar0, .dot0 { fill: #8c9eff } .bar1, .dot1 { fill: #ffb74d } .bar2, .dot2 { fill: #9aa4b2 }
.line0 { stroke: #8c9eff } .line1 { stroke: #ffb74d } .line2 { stroke: #9aa4b2 }
.rule { stroke: #4a5064 } .one, .range { stroke: #e6e8ef }
}
</style>"""


@dataclass(frozen=True)
class Value:
    """A median with its quartiles, which are the median where none were written."""

    median: float
    low: float
    high: float

    def inverted(self) -> Value:
        """Times as long, of a part of the time."""
        return Value(1 / self.median, 1 / self.high, 1 / self.low)


@dataclass(frozen=True)
class Bar:
    """One bar: its words, and where its figure stands: a row of a table, a column, and what is before the figure."""

    words: str
    table: str
    row: str
    column: int = 1
    pattern: str = FIGURE
    inverted: bool = False

    def value(self, text: str) -> Value:
        found = figure(cell(text, self.table, self.row, self.column), self.pattern)
        return found.inverted() if self.inverted else found


def rows(text: str, after: str) -> list[list[str]]:
    """The first table after the line that begins with ``after``, without its head: the cells of each row."""
    _, there, rest = text.partition(f"\n{after}")
    if not there:
        sys.exit(f"RESULTS.md has no line {after!r}")
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table, after
    return [[part.strip() for part in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def cell(text: str, after: str, row: str, column: int) -> str:
    """One cell of a table."""
    found = [cells for cells in rows(text, after) if cells[0] == row]
    if len(found) != 1:
        sys.exit(f"RESULTS.md has {len(found)} rows {row!r} in the table after {after!r}")
    return found[0][column]


def figure(said: str, pattern: str = FIGURE) -> Value:
    """The figure in a cell."""
    found = re.search(pattern, said)
    if not found:
        sys.exit(f"RESULTS.md has no figure {pattern!r} in {said!r}")
    median, *quartiles = (float(part.replace(",", "")) for part in found.groups() if part)
    low, high = quartiles or (median, median)
    return Value(median, low, high)


def svg(width: int, height: int, title: str, said: Sequence[str], parts: Sequence[str]) -> str:
    """A picture that says in words what it shows."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape(title)}</title>", f"<desc>{escape('; '.join(said))}</desc>", STYLE, *parts, "</svg>",
    ]) + "\n"  # fmt: skip


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def number(value: float) -> str:
    """As many digits as say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def bars(title: str, unit: str, given: Sequence[Bar], text: str, logarithmic: bool = False, one: str = "") -> str:
    """Bars below each other, each with its words above it and its figure behind; ``one`` marks where 1 is."""
    values = [bar.value(text) for bar in given]
    most, width, left, step = max(value.high for value in values), 480, 2, 48
    room = width - left - 70

    def length(value: float) -> float:
        return room * (math.log10(max(value, 1)) / math.log10(most) if logarithmic else value / most)

    parts, said, top = [words(left, 18, title, "head"), words(left, 38, unit, "small")], [], 52
    bottom = top + step * len(given)
    for n, (bar, value) in enumerate(zip(given, values, strict=True)):
        y = top + n * step
        parts.append(words(left, y + 15, bar.words))
        shape = f'x="{left}" y="{y + 21}" width="{length(value.median):.1f}" height="16"'
        parts.append(f'<rect {shape} class="bar{1 if one else 0}"/>')
        if value.high > value.low:
            parts.append(
                f'<path d="M{left + length(value.low):.1f} {y + 29}H{left + length(value.high):.1f}" class="range"/>'
            )
        end = max(value.median, value.high, 1 if one else 0)
        parts.append(words(left + length(end) + 6, y + 34, number(value.median), "head"))
        if one:
            parts.append(f'<path d="M{left + length(1):.1f} {y + 19}V{y + 39}" class="one"/>')
        said.append(f"{bar.words}: {number(value.median)}")
    if one:
        parts.append(words(left + length(1), bottom + 16, one, "small", "middle"))
    return svg(width, bottom + (24 if one else 6), title, said, parts)


#: What the curves of a sweep are called.
LINES = ("a warm step", "a new composition", "PEFT, adapter_names")


def curves(title: str, points: Sequence[tuple[float, list[Value | None]]]) -> str:
    """Curves over one thing that varies, both axes logarithmic, with a rule at 1."""
    width, height, left, right, top, bottom = 400, 270, 40, 16, 52, 240
    xs = [math.log2(x) for x, _ in points]
    most = max(value.median for _, values in points for value in values if value)
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick < most * 1.5]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right),
            bottom - math.log2(max(y, 0.8) / 0.8) / math.log2(max(ticks[-1], most) / 0.8) * (bottom - top),
        )

    parts, said = [words(2, 18, title, "head"), words(2, 38, "times the base without adapters", "small")], []
    for tick in ticks:
        y = at(xs[0], tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" class="{"one" if tick == 1 else "rule"}"/>')
        parts.append(words(left - 6, y + 5, str(tick), "small", "end"))
    for x in xs:
        parts.append(words(at(x, 1)[0], bottom + 18, f"{2**x:g}", "small", "middle"))
    for n, name in reversed(list(enumerate(LINES))):
        known = [(x, values[n].median) for x, (_, values) in zip(xs, points, strict=True) if values[n]]
        if known:
            places = [at(x, y) for x, y in known]
            parts.append(f'<polyline class="line{n}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot{n}"/>' for x, y in places]
            said.append(f"{name}: " + ", ".join(f"{2**x:g} {number(y)}" for x, y in known))
    return svg(width, height, title, said[::-1], parts)


def stack() -> str:
    """What LoraStack is, for the first page."""
    width, height, box = 480, 236, 'rx="8" class="box"'
    parts = [words(72, 18, "adapters", "small", "middle"), words(240, 18, "the stack", "small", "middle")]
    parts.append(words(412, 18, "what you get", "small", "middle"))
    for n, (name, scale) in enumerate((("a PEFT folder", "0.7"), ("a GGUF file", "0.3"), ("a kohya file", "-0.2"))):
        y = 32 + 68 * n
        parts.append(f'<rect x="2" y="{y}" width="140" height="44" {box}/>')
        parts.append(words(72, y + 27, name, "", "middle"))
        parts.append(f'<path d="M142 {y + 22}H186" class="line0 flow"/>')
        parts.append(f'<rect x="186" y="{y}" width="108" height="44" rx="8" class="bar0"/>')
        parts.append(words(240, y + 27, f"{scale} × B A", "over", "middle"))
    for n, name in enumerate(("a live model", "one adapter", "a new base")):
        y = 32 + 68 * n
        parts.append(f'<path d="M294 122C320 122 318 {y + 22} 344 {y + 22}" class="line0 flow"/>')
        parts.append(f'<rect x="344" y="{y}" width="134" height="44" {box}/>')
        parts.append(words(411, y + 27, name, "", "middle"))
    parts += [words(240, 90, "+", "head", "middle"), words(240, 158, "+", "head", "middle")]
    return svg(
        width,
        height,
        "Adapters of any format, a stack of them with scales, and what comes out",
        ["each adapter times its scale, added", "attached to a live model, baked into one adapter, or merged"],
        parts,
    )


def key() -> str:
    """What the curves are."""
    parts = []
    for n, name in enumerate(LINES):
        parts.append(f'<polyline class="line{n}" points="2,{14 + 22 * n} 42,{14 + 22 * n}"/>')
        parts.append(words(52, 19 + 22 * n, name))
    return svg(400, 74, "What the curves are", LINES, parts)


LIVE, ALGEBRA = "`python benchmarks/live.py`\n", "`python benchmarks/algebra.py`"
MERGE = "`python benchmarks/merge.py 8 2 3` and `MERGEKIT="
EXTRACT, CORE = "`MERGEKIT=... python benchmarks/extract.py", "`python benchmarks/core.py`\n"
BAKE, ROWS, CONVERT = (
    "`python benchmarks/bake.py 200`",
    "`python benchmarks/rows.py --rounds",
    "`python benchmarks/convert.py",
)
TOGETHER, SWEPT = "`OMP_NUM_THREADS=1 python benchmarks/together.py`", "`python benchmarks/rows.py --sweep"
PEFT_MERGE, MERGEKIT = "PEFT `merge_and_unload` + `save_pretrained`", "mergekit 0.1.5, passthrough of base+adapter"

TIME = [
    Bar("PEFT: add a mixture, cut to rank 16, at 4096", ALGEBRA, "at 4096", pattern=r": ([\d,]+) times"),
    Bar("PEFT: 8 rows of a token, an adapter each", LIVE,
        "8 rows, 8 adapters, one token each, float32, of what `adapter_names` adds", inverted=True),
    Bar("PEFT: load and attach an adapter of 9 MiB", LIVE,
        "load and attach one adapter of 9 MiB: PEFT takes, times as long"),
    Bar("mergekit: extract an adapter of rank 32", EXTRACT, "mergekit-extract-lora", 2),
    Bar("PEFT: merge and save 2 GiB", MERGE, PEFT_MERGE, pattern=r": ([\d.]+) times"),
    Bar("mergekit: merge 2 GiB", MERGE, MERGEKIT, 2, pattern=r": ([\d.]+) times"),
    Bar("PEFT: 8 rows of 32 tokens, an adapter each", LIVE, "32 tokens each, float32", inverted=True),
    Bar("PEFT: 8 adapters at once, one token", LIVE, "what PEFT adds there, of what we add"),
]  # fmt: skip
MEMORY = [
    Bar("PEFT: add a mixture, cut to rank 16, at 4096", ALGEBRA,
        "memory the call adds to the process's peak", pattern=r"and (\d+) times"),
    Bar("mergekit: merge 2 GiB", MERGE, MERGEKIT, 2, pattern=r"times, (\d+) times"),
    Bar("PEFT: merge and save 2 GiB", MERGE, PEFT_MERGE, pattern=r"times, (\d+) times"),
]  # fmt: skip
LEAST = [
    Bar("rows: 3 of 16 adapters in each of 32, layers of 512", ROWS, "of 512, 32 rows, 16 adapters, 3 a row"),
    Bar("rows: 1 of 16 adapters in each of 32, layers of 512", ROWS, "of 512, 32 rows, 16 adapters, 1 a row"),
    Bar("convert 200 MiB, of a copy", CONVERT, "convert to diffusers, of the speed of a cold, synced copy",
        pattern=r"([\d.]+)", inverted=True),
    Bar("open a PEFT folder, of a bare header read", CORE, "open a PEFT folder of 200 MiB, 448 tensors"),
    Bar("bake two adapters of 200 MiB in float16, of a copy", BAKE, "bake with its recipe", inverted=True),
    Bar("apply 4 adapters of rank 64, of two products", CORE, "`apply`, one vector, 4096 x 4096, ranks 4 x 64"),
    Bar("rows: 3 of 16 adapters in each of 32, layers of 4096", ROWS, "of 4096, 32 rows, 16 adapters, 3 a row"),
    Bar("apply 4 adapters of rank 16, of two products", CORE, "`apply`, one vector, 4096 x 4096, ranks 4 x 16"),
    Bar("8 adapters at once, of base and two products", LIVE,
        "8 adapters of rank 16, one token, float32, of base plus the bare pair"),
    Bar("merge 8 GiB, of a copy", MERGE, "merge, of the speed of a cold, synced copy", inverted=True),
]  # fmt: skip


def swept(text: str, name: str) -> list[tuple[float, list[Value | None]]]:
    """What ``benchmarks/rows.py --sweep`` printed of one thing that it varied."""
    return [
        (float(found[1]), [None if said == "-" else figure(said) for said in cells])
        for what, *cells in rows(text, SWEPT)
        if (found := re.fullmatch(rf"{name} (\d+)", what))
    ]


PICTURES: dict[str, Callable[[str], str]] = {
    "stack.svg": lambda text: stack(),
    "time.svg": lambda text: bars("Time", "times as long as LoraStack (logarithmic)", TIME, text, logarithmic=True),
    "memory.svg": lambda text: bars("Memory", "times as much as LoraStack", MEMORY, text),
    "least.svg": lambda text: bars(
        "Against the least", "times as long as what has to be done", LEAST, text, one="the least: 1"
    ),
    "rows-key.svg": lambda text: key(),
    **{
        f"rows-{name.replace(' ', '-')}.svg": partial(
            lambda name, title, text: curves(title, swept(text, name)), name, title
        )
        for name, title in (
            ("hidden", "Width of the layers"),
            ("rank", "Rank of each adapter"),
            ("adapters", "Adapters attached"),
            ("rows", "Rows of the batch"),
            ("adapters a row", "Adapters in each row"),
        )
    },
}

if __name__ == "__main__":
    results = RESULTS.read_text()
    for name, draw in PICTURES.items():
        picture, path = draw(results), HERE / "assets" / name
        if "--check" not in sys.argv:
            path.write_text(picture)
        elif not path.exists() or path.read_text() != picture:
            sys.exit(f"docs/assets/{name} is not of benchmarks/RESULTS.md; run: python docs/build_pictures.py")
