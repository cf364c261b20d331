"""Write docs/cli.md from the commands and docs/targets.md from the table; with --check only say whether they are so."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import typer.main

from lorastack.cli.application import app
from lorastack.cli.help import parts_of
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.targets import FORMATS, PROGRAMS, Target

HERE = Path(__file__).parent


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
        flags = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        names = ", ".join(f"`{flag}`" for flag in flags)
        shown = names or f"`{(parameter.metavar or (parameter.name or '').upper()).replace('|', ' ')}`"
        text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        rows.append(f"| {shown.replace('|', ' ')} | {text} |")
    return "\n".join(rows)


def targets() -> str:
    """The table of formats and programs, and what each cannot hold."""
    return "\n\n".join([
        "# What formats and programs hold",
        "Written by `docs/build_reference.py` from `lorastack.targets`. `lorastack convert` and `bake --for` write "
        "what a row allows and refuse the rest by name.",
        *_rows("Formats (`--to`)", list(FORMATS.values())),
        *_rows("Programs (`--for`)", list(PROGRAMS.values())),
        "## What the extras are",
        "\n".join(f"- `{kind}`: {what}" for kind, what in KINDS.items()),
    ]) + "\n"  # fmt: skip


def _rows(title: str, rows: list[Target]) -> list[str]:
    table = [
        "| | reads | updates of | experts | ranks and scalings | extras it honours | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = ", ".join(kind for kind in ("linear", "conv", "embedding", "experts") if kind in row.kinds)
        refused = ", ".join(f"`{kind}`" for kind in KINDS if kind not in row.extras and kind not in HARMLESS)
        held = ", ".join(f"`{kind}`" for kind in KINDS if kind in row.extras)
        shape = [
            *(["one scaling"] if row.one_scaling else []),
            *(["one rank"] if row.one_rank else []),
            *([f"at most {row.ranks[-1]}"] if row.ranks else []),
        ]
        name = row.title if row.title.lower() == row.name else f"{row.title} (`{row.name}`)"
        experts = row.experts or ("either" if "experts" in row.kinds else "-")
        table.append(
            f"| {name} | {row.format} | {kinds} | {experts} "
            f"| {', '.join(shape) or 'any'} | {held or '-'} | {refused or '-'} |"
        )
    return [f"## {title}", "\n".join(table), "\n".join(f"- {row.title}: {row.note}" for row in rows if row.note)]


#: Between these lines of docs/fleet.md stands the table of engines.
_BEGIN, _END = "<!-- engines: written by docs/build_reference.py -->", "<!-- end of engines -->"


def fleet() -> str:
    """docs/fleet.md with its table of engines as lorastack.targets has it."""
    text = (HERE / "fleet.md").read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    table = ["| engine | how a stack is given | tried with |", "|---|---|---|"]
    table += [
        f"| {row.title} | {row.given.replace('|', ' ')} | {row.tried or 'untried'} |"
        for row in PROGRAMS.values()
        if row.given
    ]
    notes = [f"- {row.title}: {row.note}" for row in PROGRAMS.values() if row.given and row.note]
    return "\n".join([before + _BEGIN, "", *table, "", *notes, "", _END + after])


PAGES = {"cli.md": reference, "targets.md": targets, "fleet.md": fleet}

if __name__ == "__main__":
    for name, page in PAGES.items():
        text, path = page(), HERE / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"docs/{name} is not up to date; run: python docs/build_reference.py")
