"""``lorastack inspect``: what adapters are, as a table or JSON."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorastack.base import open_base
from lorastack.cli.console import echo_json, plain, say_error
from lorastack.cli.options import Base, Ignore, Rename, parse_renames
from lorastack.errors import LoraStackError, LoraStackWarning
from lorastack.files import bytes_in_words
from lorastack.formats import load
from lorastack.inspect import Inspection, inspect


def inspect_command(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="GGUF files, PEFT folders or hub ids.", show_default=False)
    ],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each adapter in a list.")] = False,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Say what adapters are: weights, ranks, alpha, scaling, types, size, and what is odd about them.

    With `--base`, also what would not fit that base; the exit code is then 1 when something does not.

    Examples:

    `lorastack inspect zara.gguf ./robot`

    `lorastack inspect ./robot --base ./my-model --json`
    """
    model = open_base(base) if base else None
    found: list[Inspection] = []
    failed: list[str] = []
    for path in adapters:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LoraStackWarning)  # what it would say is among what is odd
                lora = load(path, allow_nonfinite=True, ignore=ignore or (), rename=parse_renames(rename))
                found.append(inspect(lora, model))
        except LoraStackError as error:
            failed.append(str(error))
    if as_json:
        echo_json([one.to_dict() for one in found])
    elif found:
        _print(found)
    for text in failed:
        say_error(text)
    if failed or any(one.misfits for one in found):
        raise typer.Exit(1)


def _print(found: list[Inspection]) -> None:
    console = Console(highlight=False, soft_wrap=False)
    table = Table("adapter", *(plain(one.name) for one in found), show_lines=False)
    rows = {
        "format": [one.format for one in found],
        "base": [one.base or one.architecture or "not said" for one in found],
        "weights": [f"{one.weights} ({', '.join(one.modules[:8])})" for one in found],
        "rank": [_few(one.ranks) for one in found],
        "alpha": ["none" if one.alpha is None else f"{one.alpha:g}" for one in found],
        "scaling": [_few(one.scalings) for one in found],
        "types": [", ".join(one.dtypes) for one in found],
        "parameters": [f"{one.parameters:,}" for one in found],
        "size": ["" if one.size is None else bytes_in_words(one.size) for one in found],
        "made of": ["a recipe (--json shows it)" if one.recipe else "" for one in found],
    }
    for label, cells in rows.items():
        if any(cells):
            table.add_row(label, *(plain(cell) for cell in cells))
    console.print(table)
    for one in found:
        for line in one.odd:
            console.print(f"[yellow]{plain(one.name)}:[/] {plain(line)}", soft_wrap=True)
        for line in one.misfits or []:
            console.print(f"[bold red]{plain(one.name)} does not fit:[/] {plain(line)}", soft_wrap=True)
        if one.misfits == []:
            console.print(f"[green]{plain(one.name)} fits the base[/]", soft_wrap=True)


def _few(values: list[int] | list[float]) -> str:
    text = [f"{value:g}" for value in values]
    return ", ".join(text) if len(text) <= 6 else f"{text[0]} to {text[-1]} ({len(text)} values)"
