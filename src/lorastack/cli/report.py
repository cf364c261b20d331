"""``lorastack report``: one page about a stack, with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.console import echo_json, remark
from lorastack.cli.options import (
    Adapters,
    AllowMixedBases,
    Base,
    Force,
    Ignore,
    Json,
    LokrRank,
    Quiet,
    Rename,
    parse_renames,
)
from lorastack.errors import ArgumentError


def report(
    adapters: Adapters,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NAME.html", help="The page to write.")],
    base: Base = None,
    intruders: Annotated[
        bool,
        typer.Option(
            "--intruders", help="With --base: look for intruder dimensions too; seconds to minutes a weight, once."
        ),
    ] = False,
    force: Force = False,
    allow_mixed_bases: AllowMixedBases = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one page about adapters and their sum: norms, spectra, similarity, conflicts, what a bake would lose.

    The page works without a network, in light and dark, on a phone and on paper. It needs plotly:
    `pip install 'lorastack[report]'`.

    Examples:

    `lorastack report zara.gguf:0.7 excited.gguf:0.3 -o report.html`

    `lorastack report ./zara ./robot:0.5 --base ./my-model -o report.html`

    `lorastack report recipe.toml -o report.html --force`
    """
    from lorastack.cli.missing import require_all
    from lorastack.cli.progress import step_bar
    from lorastack.files import bytes_in_words, check_output
    from lorastack.recipe import Recipe, recipe_files

    if output.suffix not in (".html", ".htm"):
        raise ArgumentError(f"{output}: give it a name that ends with .html")
    check_output(output, force)
    recipe = Recipe.of_words(adapters, base)
    check_output(output, force, recipe.sources + recipe_files(adapters))
    if intruders and not recipe.base:
        raise ArgumentError("--intruders compares with the base; give it with --base")
    require_all("report")
    from lorastack.report import report as write

    model = recipe.open_base()
    stack = recipe.stack(base=model, ignore=ignore or (), rename=parse_renames(rename), rank=lokr_rank)
    with step_bar("measuring") as step:
        write(stack, output, model, force, intruders=intruders, allow_mixed_bases=allow_mixed_bases, progress=step)
    size = output.stat().st_size
    if as_json:
        echo_json({"output": str(output), "adapters": len(stack), "size": size})
    else:
        remark(f"{output}: {len(stack)} adapter{'s' if len(stack) != 1 else ''}, {bytes_in_words(size)}")
