"""Tables that lose nothing: on a narrow terminal they are shortened, turned over or cut in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import NamedTuple

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table

from lorastack.cli.console import plain
from lorastack.decimals import fixed as fixed

#: Wider than any table: where nobody looks, nothing is wrapped.
_UNBOUNDED = 1 << 20
#: Letters of a long heading in one line.
_HEADING = 12
_LAYER = re.compile(r"(?:.*\.)?(?:layers|layer|blocks|block|blk|h)\.(\d+)\.(?:.*\.)?([^.]+)$")


class Cell(NamedTuple):
    """A cell with a colour of its own."""

    text: str
    style: str = ""


class Grid(NamedTuple):
    """Records with the same fields, under titles; ``names`` are the columns that hold names of weights."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    names: Sequence[int] = ()

    def with_short_names(self) -> Grid:
        """The names of weights in as few letters as tell them apart."""
        rows = [list(row) for row in self.rows]
        for column in self.names:
            short = short_names(sorted({name for row in rows for name in _text(row[column]).split(", ") if name}))
            for row in rows:
                row[column] = ", ".join(short.get(name, name) for name in _text(row[column]).split(", "))
        return self._replace(rows=rows)

    def turned(self) -> Grid:
        """A row for each field, a column for each record."""
        heads = [_text(row[0]) for row in self.rows]
        rows = [[self.titles[n], *(row[n] for row in self.rows)] for n in range(1, len(self.titles))]
        return Grid([self.titles[0], *heads], rows, self.title)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name of a weight -> its layer and module, where that tells the names apart.

    >>> list(short_names(["model.layers.3.self_attn.v_proj.weight", "blk.12.attn_q.weight", "lm_head.weight"]).values())
    ['L3.v_proj', 'L12.attn_q', 'lm_head']
    """
    plain_names = {name: name.removesuffix(".weight") for name in names}
    short = {name: _LAYER.sub(r"L\1.\2", own) for name, own in plain_names.items()}
    return short if len(set(short.values())) == len(names) else plain_names


def show(grid: Grid, turned_first: bool = False, shorter: Grid | None = None) -> None:
    """Print a table in the first of these ways in which no word is cut: as it is, with short names, turned over.

    ``shorter`` says the same in fewer letters than short names make of it.
    """
    short = (shorter or grid).with_short_names()
    ways = [grid.turned(), short.turned()] if turned_first else [grid, short]
    _show_first(ways, short.turned())


def show_matrix(names: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> None:
    """Print a square of numbers; where names are too wide for a heading, columns are headed by their rows' numbers."""
    numbers = [str(n) for n in range(1, len(names) + 1)]
    rows = [[f"{n} {name}", *row] for n, name, row in zip(numbers, names, cells, strict=True)]
    bare = Grid(["", *numbers], [[n, *row] for n, row in zip(numbers, cells, strict=True)])
    legend = "\n".join([title, *(row[0] for row in rows)])
    _show_first([Grid(["", *names], rows, title), Grid(["", *numbers], rows, title)], bare._replace(title=legend))


def _show_first(ways: Sequence[Grid], last: Grid) -> None:
    """Print the first that fits; else the columns of the last one, in as many tables as they need."""
    console = Console(highlight=False)
    if not console.is_terminal:  # it has no width, and what reads it wants everything
        drawn = _table(ways[0])
        width = console.measure(drawn, options=console.options.update(width=_UNBOUNDED)).maximum
        Console(highlight=False, width=width, file=console.file, no_color=True).print(drawn)
        return
    for grid, lines in [*((grid, box.HEAVY_HEAD) for grid in ways), (ways[-1], box.SIMPLE_HEAD)]:
        if widths := _widths(grid, console.width, 2 if lines is box.SIMPLE_HEAD else 3):
            console.print(_table(grid, lines, widths))
            return
    for part in _that_fit(last, console.width):
        console.print(_table(part, widths=_widths(part, console.width, 3)))


def _widths(grid: Grid, width: int, around: int) -> list[int] | None:
    """How wide each column is to be; None where their longest words do not fit side by side.

    ``around`` is what goes between two columns.
    """
    columns = [[grid.titles[n], *(_text(row[n]) for row in grid.rows)] for n in range(len(grid.titles))]
    least = [max(map(_longest, cells)) for cells in columns]
    found = [max(cell_len(line) for cell in cells for line in cell.split("\n")) for cells in columns]
    room = width - around * len(columns) - 1
    if sum(least) > room:
        return None
    while sum(found) > room:  # the widest that can be narrower gives way
        n = max((n for n in range(len(found)) if found[n] > least[n]), key=lambda n: found[n])
        found[n] -= 1
    return found


def _that_fit(grid: Grid, width: int) -> Iterator[Grid]:
    """The columns in several tables, each with the first one, under headings that go on in the next line."""
    first = min(max(_longest(_text(row[0])) for row in grid.rows), width // 2)
    heading = min(_HEADING, max(map(_longest, grid.titles[1:])))
    each = max(heading, *(_longest(_text(cell)) for row in grid.rows for cell in row[1:]))
    each = min(each, width - first - 7)
    step = max(1, (width - first - 4) // (each + 3))
    for start in range(1, len(grid.titles), step):
        span = slice(start, start + step)
        titles = [_folded(grid.titles[0], first), *(_folded(title, each) for title in grid.titles[span])]
        rows = [[_folded(_text(row[0]), first), *row[span]] for row in grid.rows]
        yield Grid(titles, rows, grid.title if start == 1 else "")


def _longest(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)  # letters of some alphabets take two cells


def _folded(text: str, width: int) -> str:
    """A text whose words are cut where they are longer than this; the pieces stand below each other."""
    if _longest(text) <= width:
        return text
    return "\n".join(piece for word in text.split() for piece in _pieces(word, width))


def _pieces(word: str, width: int) -> list[str]:
    """A word in pieces no wider than this, cut at hyphens where there are any."""
    return wrap(word, width) if cell_len(word) == len(word) else chop_cells(word, width)


def _table(grid: Grid, lines: box.Box = box.HEAVY_HEAD, widths: Sequence[int] | None = None) -> Table:
    table = Table(*map(plain, grid.titles), title=plain(grid.title) or None, title_justify="left", box=lines)
    for n, column in enumerate(table.columns):
        column.overflow, column.width = "fold", widths[n] if widths else None
    for row in grid.rows:
        table.add_row(*map(_styled, row))
    return table


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _styled(cell: str | Cell) -> str:
    text = plain(_text(cell))
    return f"[{cell.style}]{text}[/]" if isinstance(cell, Cell) and cell.style else text
