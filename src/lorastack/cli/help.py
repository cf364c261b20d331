"""Help as plain text: it can be read at any width and through a pipe, and examples can be copied as they stand."""

from __future__ import annotations

import inspect
import re
from typing import Any

from typer.core import TyperCommand

_EXAMPLE = re.compile(r"`([^`]+)`")
#: What typer writes behind options that have no metavar of their own, and what is written instead.
_TYPE = re.compile(r" <(\w+)[^>]*>")
_KINDS = {"int": " N", "float": " X", "path": " FILE", "bool": ""}


def parts_of(text: str) -> list[str | list[str]]:
    """The paragraphs of a help text, and between them the examples that stand together, a command each.

    >>> parts_of("Do it.\\n\\nExamples:\\n\\n`do this`\\n\\n`do that`\\n\\nOr leave it.")
    ['Do it.', 'Examples:', ['do this', 'do that'], 'Or leave it.']
    """
    parts: list[str | list[str]] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if found := _EXAMPLE.fullmatch(paragraph.replace("\n", " ")):
            if parts and isinstance(parts[-1], list):
                parts[-1].append(found[1])
            else:
                parts.append([found[1]])
        elif paragraph:
            parts.append(paragraph)
    return parts


class Command(TyperCommand):
    """A subcommand whose help shows examples as blocks, each in one line."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        for part in parts_of(self.help or ""):
            formatter.write_paragraph()
            with formatter.indentation():
                if isinstance(part, str):
                    formatter.write_text(part.replace("`", ""))
                else:
                    for example in part:
                        formatter.write(f"{'':{formatter.current_indent}}  {example}\n")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return [self.options_metavar or "", *map(_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for one in self.get_params(ctx):
            if found := one.get_help_record(ctx):
                term = _argument(one) if one.param_type_name == "argument" else _TYPE.sub(_kind, found[0])
                rows[one.param_type_name].append((term, found[1].replace("`", "")))
        for kind, title in (("argument", "Arguments"), ("option", "Options")):
            if rows[kind]:
                with formatter.section(title):
                    formatter.write_dl(rows[kind])


def _kind(found: re.Match[str]) -> str:
    return _KINDS.get(found[1], " TEXT")


def _argument(one: Any) -> str:
    """How an argument is written: ``[ADAPTER]...`` where it may be left out and repeated."""
    name: str = one.metavar or one.name.upper()
    return name if one.required or name.startswith("[") else f"[{name}]"
