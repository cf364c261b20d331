"""Markdown: texts out of files and names in the cards that are written."""

from __future__ import annotations


def in_a_cell(text: str) -> str:
    """A text on one line, and no end of a table's cell.

    >>> in_a_cell("a\\n|b")
    'a \\\\|b'
    """
    return " ".join(text.split()).replace("|", "\\|")
