"""Tables that lose nothing: on a narrow terminal they are shortened, turned over or cut in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lorastack.cli.console import plain

#: Wider than any table: where nobody looks, nothing is wrapped.
_UNBOUNDED = 1 << 20
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


def fixed(value: float, digits: int) -> str:
    """A number with so many digits; nothing that rounds to zero has a sign.

    >>> fixed(-0.0004, 3), fixed(-0.0006, 3)
    ('0.000', '-0.001')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def show(grid: Grid, turned_first: bool = False) -> None:
    """Print a table in the first of these ways that fits: as it is, with short names, turned over, in blocks."""
    console = Console(highlight=False)
    for drawn in _drawn(grid, turned_first):
        width = console.measure(drawn, options=console.options.update(width=_UNBOUNDED)).maximum
        if width <= console.width or not console.is_terminal:
            _print(console, drawn, width)
            return
    for drawn in _blocks(grid, console.width):
        console.print(drawn)


def show_matrix(names: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> None:
    """Print a square of numbers; where names are too wide for a heading, columns are headed by their rows' numbers."""
    console = Console(highlight=False)
    numbered = [f"{n} {name}" for n, name in enumerate(names, 1)]
    wide = Grid(["", *names], [[name, *row] for name, row in zip(names, cells, strict=True)], title)
    rows = [[name, *row] for name, row in zip(numbered, cells, strict=True)]
    narrow = Grid(["", *(str(n) for n in range(1, len(names) + 1))], rows, title)
    for grid in (wide, narrow):
        drawn = _table(grid)
        width = console.measure(drawn, options=console.options.update(width=_UNBOUNDED)).maximum
        if width <= console.width or not console.is_terminal:
            _print(console, drawn, width)
            return
    for part in _columns_that_fit(narrow, console.width):
        console.print(_table(part))


def _drawn(grid: Grid, turned_first: bool) -> Iterator[Table]:
    short = grid.with_short_names()
    if turned_first:
        yield _table(grid.turned())
        yield _table(short.turned())
        return
    yield _table(grid)
    yield _table(short)
    if len(grid.rows) > 1:
        yield _table(short.turned())


def _print(console: Console, drawn: Table, width: int) -> None:
    if console.is_terminal:
        console.print(drawn)
    else:
        Console(highlight=False, width=width, file=console.file, no_color=True).print(drawn)


def _blocks(grid: Grid, width: int) -> Iterator[Table]:
    """A block of lines for each record; a text wider than the terminal goes on in the next line."""
    title = grid.title
    for row in grid.with_short_names().rows:
        table = Table(plain(grid.titles[0]), plain(_text(row[0])), title=plain(title) or None, title_justify="left")
        for name, cell in list(zip(grid.titles, row, strict=True))[1:]:
            table.add_row(plain(name), _styled(cell))
        for column in table.columns:
            column.overflow = "fold"
        title = ""
        yield table


def _columns_that_fit(grid: Grid, width: int) -> Iterator[Grid]:
    """The columns in several tables, each with the first one."""
    first = max(len(_text(row[0])) for row in grid.rows) + 4
    each = max(len(_text(cell)) for row in grid.rows for cell in row[1:]) + 3
    step = max(1, (width - first) // each)
    for start in range(1, len(grid.titles), step):
        span = slice(start, start + step)
        yield Grid(
            [grid.titles[0], *grid.titles[span]], [[row[0], *row[span]] for row in grid.rows], grid.title * (start == 1)
        )


def _table(grid: Grid) -> Table:
    table = Table(*map(plain, grid.titles), title=plain(grid.title) or None, title_justify="left")
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ignore"
    for row in grid.rows:
        table.add_row(*map(_styled, row))
    return table


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _styled(cell: str | Cell) -> str:
    text = plain(_text(cell))
    return f"[{cell.style}]{text}[/]" if isinstance(cell, Cell) and cell.style else text
