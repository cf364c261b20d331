"""Write docs/cli.md from the commands themselves; with --check only say whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import typer.main

from lorastack.cli.application import app
from lorastack.cli.help import parts_of

TARGET = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The reference of every command, in Markdown."""
    group = typer.main.get_command(app)
    parts = ["# Command reference", "Written by `docs/build_reference.py` from the commands' own help."]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts += [f"## lorastack {name}", _text(command.help or ""), _table(command)]
    return "\n\n".join(parts) + "\n"


def _text(help: str) -> str:
    """A help text in Markdown, with its examples as blocks."""
    parts = ["```sh\n" + "\n".join(part) + "\n```" if isinstance(part, list) else part for part in parts_of(help)]
    return "\n\n".join(parts)


def _table(command: click.Command) -> str:
    rows = ["| argument or option | what it is |", "|---|---|"]
    for parameter in command.params:
        names = ", ".join(f"`{o}`" for o in parameter.opts) if parameter.param_type_name == "option" else ""
        shown = names or f"`{(parameter.metavar or (parameter.name or '').upper()).replace('|', ' ')}`"
        text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        rows.append(f"| {shown.replace('|', ' ')} | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    text = reference()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit("docs/cli.md is not up to date; run: python docs/build_reference.py")
    else:
        TARGET.write_text(text)
