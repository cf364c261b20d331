"""``lorastack inspect``: what adapters are, as a table or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.console import echo_json, plain, say_error
from lorastack.cli.options import Base, Ignore, LokrRank, Quiet, Rename, parse_renames

if TYPE_CHECKING:
    from lorastack.inspect import Inspection


def inspect_command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="Files or folders of any format, hub ids, recipes (.toml), or folders that hold several adapters.",
            show_default=False,
        ),
    ],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each adapter in a list.")] = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    quiet: Quiet = False,
) -> None:
    """Say what adapters are: weights, ranks, alpha, scaling, types, size, and what is odd about them.

    With `--base`, also what would not fit that base; the exit code is then 1 when something does not.

    Examples:

    `lorastack inspect zara.gguf ./robot`

    `lorastack inspect ./all-my-adapters recipe.toml`

    `lorastack inspect ./robot --base ./my-model --json`
    """
    import warnings

    from lorastack.base import open_base
    from lorastack.errors import LoraStackError, LoraStackWarning
    from lorastack.inspect import inspect
    from lorastack.recipe import each_of, load

    model = open_base(base) if base else None
    found: list[Inspection] = []
    failed: list[str] = []
    for path in [one for word in adapters for one in each_of(word)]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LoraStackWarning)  # what it would say is among what is odd
                of_recipe = model if path.endswith(".toml") else None
                lora = load(
                    path,
                    allow_nonfinite=True,
                    ignore=ignore or (),
                    rename=parse_renames(rename),
                    rank=lokr_rank,
                    base=of_recipe,
                )
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
    from lorastack.cli.tables import Grid, show
    from lorastack.files import bytes_in_words

    fields = {
        "adapter": [one.name for one in found],
        "format": [one.format for one in found],
        "base": [one.base or one.architecture or "not said" for one in found],
        "weights": [str(one.weights) for one in found],
        "modules": [", ".join(one.modules) for one in found],
        "rank": [_few(one.ranks) for one in found],
        "alpha": ["none" if one.alpha is None else f"{one.alpha:g}" for one in found],
        "scaling": [_few(one.scalings) for one in found],
        "types": [", ".join(one.dtypes) for one in found],
        "parameters": [f"{one.parameters:,}" for one in found],
        "size": ["" if one.size is None else bytes_in_words(one.size) for one in found],
        "network": [one.training.get("network", "") for one in found],
        "resolution": [one.training.get("resolution", "") for one in found],
        "trigger words": [", ".join(one.training.get("trigger_words", ())[:5]) for one in found],
        "tags": [", ".join(f"{tag} {n}" for tag, n in one.training.get("tags", ())[:8]) for one in found],
        "hashes": [", ".join(f"{kind} {value}" for kind, value in one.hashes.items()) for one in found],
        "made of": ["a recipe (--json shows it)" if one.recipe else "" for one in found],
    }
    said = {title: cells for title, cells in fields.items() if any(cells)}
    show(Grid(list(said), list(zip(*said.values(), strict=True))), turned_first=True)
    for one in found:
        for line in one.odd:
            _line(f"{one.name}:", "yellow", line)
        for line in one.misfits or []:
            _line(f"{one.name} does not fit:", "bold red", line)
        if one.misfits == []:
            _line(f"{one.name} fits the base", "green")


def _line(label: str, style: str, text: str = "") -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(f"[{style}]{plain(label)}[/] {plain(text)}".rstrip())


def _few(values: list[int] | list[float]) -> str:
    text = [f"{value:g}" for value in values]
    return ", ".join(text) if len(text) <= 6 else f"{text[0]} to {text[-1]} ({len(text)} values)"
