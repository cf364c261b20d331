"""What a notebook shows of adapters and stacks: a small table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lorastack.errors import printable

#: Of one adapter; a stack's table has its scale in front.
LORA_FIELDS = ("adapter", "weights", "rank", "names", "extras")


def lora_row(lora: Any, name: str | None = None) -> tuple[object, ...]:
    """The cells of an adapter, under its own name or that on a stack."""
    naming = {"gguf": "GGUF", "hf": "Hugging Face", "kohya": "kohya", "own": "its own"}[lora.naming]
    return name or lora.name, lora.num_adapters(), lora.rank, naming, ", ".join(sorted(lora.extras)) or "none"


def html_table(title: str, fields: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in HTML; every text is escaped.

    >>> html_table("one", ["name"], [["<b>"]])
    '<table><caption>one</caption><tr><th>name</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    head = "".join(f"<th>{escape(field)}</th>" for field in fields)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(str(c)))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(printable(title))}</caption><tr>{head}</tr>{body}</table>"
