"""Markdown: texts out of files and names in the cards and tables that are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lorastack.errors import printable

#: What would end a cell, begin HTML, a link, code or a formula, or change letters; inside a word ``_`` does nothing.
_SPECIAL = re.compile(r"[\\|<>&`*\[\]~$#]|(?<![^\W_])_|_(?![^\W_])")


def in_a_cell(text: str) -> str:
    """A text on one line, and no end of a table's cell, nor anything else but text.

    >>> in_a_cell("a\\n|b"), in_a_cell("my_model _x_ <b>")
    ('a \\\\|b', 'my_model \\\\_x\\\\_ \\\\<b\\\\>')
    """
    return _SPECIAL.sub(r"\\\g<0>", printable(" ".join(text.split())))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; whatever the cells hold, it has these rows and columns.

    >>> table(["adapter", "scale"], [["a|b", "0.7"]])
    ['| adapter | scale |', '|---|---|', '| a\\\\|b | 0.7 |']
    """

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(in_a_cell, cells))} |"

    return [line(columns), f"|{'---|' * len(columns)}", *map(line, rows)]


def picture(place: str | None, title: str, said: str) -> str:
    """A picture, with what it shows in words for who cannot see it; without a place the words alone.

    >>> picture("figures/a.svg", "Norm: a", "4 places."), picture(None, "Norm: a|b", "one place.")
    ('![Norm: a: 4 places.](figures/a.svg)', 'Norm: a\\\\|b: one place.')
    """
    words = in_a_cell(f"{title}: {said}")
    return f"![{words}]({place})" if place else words
