"""``lorastack vllm-check``: which adapters vLLM can serve on a base, and the command that serves their mixtures."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.console import echo, echo_json, say_warning
from lorastack.cli.options import Json, Quiet
from lorastack.errors import ArgumentError

if TYPE_CHECKING:
    from lorastack.cli.tables import Grid
    from lorastack.fleet.vllm_check import Checked


def vllm_check(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that vLLM will serve.", show_default=False)],
    library: Annotated[
        Path, typer.Option("--library", metavar="DIR", help="The folder with adapters and recipes.", show_default=False)
    ],
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder for baked mixtures; below ~/.cache/lorastack when not given."),
    ] = None,
    parts: Annotated[
        int, typer.Option(metavar="N", min=1, max=8, help="How many adapters a mixture will have: their ranks add up.")
    ] = 2,
    slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many mixtures there may be in one batch (--max-loras).")
    ] = 8,
    endpoint: Annotated[bool, typer.Option("--endpoint", help="With the optional route GET /v1/mixtures.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which adapters of a library vLLM can serve, and how.

    What cannot be served has its reason; the command that starts vLLM is printed whole, its other plugins kept. A
    request to that server names its stack in the place of the model: `"model": "zara:0.7+excited:0.3"`. Run this in
    the environment that vLLM runs in, so that its plugins are seen.

    Examples:

    `lorastack vllm-check ./my-model --library ./my-adapters`

    `lorastack vllm-check ./my-model --library ./my-adapters --parts 3 --slots 16 --endpoint`
    """
    from lorastack.cli.tables import show
    from lorastack.fleet.library import Library
    from lorastack.fleet.vllm_check import check, command, plugins, rank_for

    loras = Library(library)
    found = check(base, loras)
    widest, rank = rank_for(found, parts)
    names = plugins(os.environ, endpoint)
    line = command(base, loras, rank, slots, names, cache)
    here = importlib.util.find_spec("vllm") is not None
    if as_json:
        adapters = [{"name": one.name, "rank": one.rank, "problem": one.problem} for one in found]
        echo_json({"adapters": adapters, "rank": widest, "max_lora_rank": rank, "plugins": names, "command": line,
                   "vllm_is_here": here})  # fmt: skip
    else:
        show(_table(found))
        for one in found:
            if one.problem:
                echo(f"\n{one.name} cannot be served: {one.problem}")
        echo(f"\nThe widest mixture of {parts} has rank {widest}. Start vLLM with\n\n{line}\n")
        echo("One API server: several number adapters each by itself, and vLLM does not start with more and resolvers.")
        if names is not None:
            echo(
                "VLLM_PLUGINS names all plugins that may be loaded, of whatever kind: add those of yours that it lacks."
            )
        if rank < widest:
            say_warning(f"mixtures of rank {rank + 1} to {widest} will be refused: vLLM takes no more than {rank}")
        if not here:
            say_warning("vllm is not installed here, so plugins that its own environment has are not seen")
    if not any(one.rank is not None for one in found):
        raise ArgumentError(f"no adapter in {library} can be served on {base}")


def _table(found: list[Checked]) -> Grid:
    from lorastack.cli.tables import Grid

    rows = [
        (one.name, "yes" if one.rank is not None else "no", "-" if one.rank is None else str(one.rank)) for one in found
    ]
    return Grid(("adapter", "can be served", "rank"), rows)
