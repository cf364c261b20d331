"""Markdown: a report's words and tables for a card or a pull request; needs no plotting library.

No path of a machine is in it, and so no recipe: the first table has the adapters and their scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorastack import markdown
from lorastack.markdown import in_a_cell
from lorastack.report import tables
from lorastack.report.findings import Findings
from lorastack.report.selection import MOST, cancelling
from lorastack.report.summary import notes, summary
from lorastack.report.tables import Table


class Picture(NamedTuple):
    """Where a figure lies as seen from the text, and what it shows; without a place the sentence says it all."""

    place: str | None
    title: str
    said: str


#: Section -> its pictures; `drawings.SECTIONS` has the words.
Pictures = Mapping[str, Sequence[Picture]]


def as_markdown(found: Findings, pictures: Pictures | None = None) -> str:
    """The whole text."""
    names = " + ".join(f"{one.name}:{one.scale:.4g}" for one in found.comparison.adapters)
    lines = [f"# {in_a_cell(names)}", "", in_a_cell(summary(found))]
    lines += ["", *(f"- {in_a_cell(note)}" for note in notes(found))] if notes(found) else []
    for title, table, said in _sections(found):
        pictured = _pictured((pictures or {}).get(title, ()))
        if table is None and not pictured:
            continue
        lines += ["", f"## {title}", *(["", in_a_cell(said)] if said else []), *pictured]
        lines += ["", *markdown.table(table.columns, table.rows)] if table else []
    return "\n".join(lines) + "\n"


def _sections(found: Findings) -> list[tuple[str, Table | None, str]]:
    """Title, table, and what is said of it."""
    several = len(found.adapters) > 1
    there = cancelling(found)
    worst = f"The {MOST} worst of {len(there)}." if len(there) > MOST else ""
    return [
        ("The adapters", tables.adapters(found), ""),
        ("Where they change the model", None, ""),
        ("Spectra", None, ""),
        ("How alike they are", tables.pairs(found) if several else None, ""),
        ("Where they conflict", tables.conflicts(found) if there else None, worst),
        ("What a bake would lose", tables.bakes(found), ""),
    ]


def _pictured(pictures: Sequence[Picture]) -> list[str]:
    """Pictures with what they show in words for who cannot see them."""
    return [line for one in pictures for line in ("", markdown.picture(*one))]
