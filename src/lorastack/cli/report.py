"""``lorastack report``: a page about a stack with plots, its words and tables as Markdown, its figures as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.console import echo, echo_json, remark
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

if TYPE_CHECKING:
    from lorastack.report.outputs import Outputs


def report(
    adapters: Adapters,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="NAME.html", help="The page to write, with plots.")
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write words and tables as Markdown, `-` to print them; links the pictures."),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write every figure as a picture of its own into a new folder."),
    ] = None,
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
    """Write a report about adapters and their sum: norms, spectra, similarity, conflicts, what a bake would lose.

    The page works without a network, in light and dark, on a phone and on paper. It and pictures need plotly:
    `pip install 'lorastack[report]'`; Markdown, for a card or a pull request, does not.

    Examples:

    `lorastack report zara.gguf:0.7 excited.gguf:0.3 -o report.html`

    `lorastack report ./zara ./robot:0.5 --base ./my-model -o report.html`

    `lorastack report recipe.toml --markdown report.md --svg pictures --force`

    `lorastack report ./zara ./robot:0.5 --markdown -`
    """
    from lorastack.cli.missing import require_all
    from lorastack.cli.progress import step_bar
    from lorastack.recipe import Recipe, recipe_files
    from lorastack.report.outputs import Outputs, write

    printed = markdown == "-"
    if output is None and markdown is None and svg is None:
        raise ArgumentError("there is nothing to write; give -o NAME.html, --markdown FILE or --svg FOLDER")
    if printed and as_json:
        raise ArgumentError("--markdown - and --json both print; give --markdown a file")
    if output is not None and output.suffix not in (".html", ".htm"):
        raise ArgumentError(f"{output}: give it a name that ends with .html")
    outputs = Outputs(output, Path(markdown) if markdown and not printed else None, svg)
    outputs.check(force)
    recipe = Recipe.of_words(adapters, base)
    outputs.check(force, recipe.sources + recipe_files(adapters))
    if intruders and not recipe.base:
        raise ArgumentError("--intruders compares with the base; give it with --base")
    if output or svg:
        require_all("report")

    model = recipe.open_base()
    stack = recipe.stack(base=model, ignore=ignore or (), rename=parse_renames(rename), rank=lokr_rank)
    with step_bar("measuring") as step:
        text = write(
            stack, outputs, model, force, intruders=intruders, allow_mixed_bases=allow_mixed_bases, progress=step
        )
    if printed:
        echo(text, end="")
    elif as_json:
        echo_json(_numbers(outputs, len(stack)))
    else:
        _say(outputs, len(stack))


def _numbers(outputs: Outputs, adapters: int) -> dict[str, Any]:
    page, markdown, svg = outputs
    return {
        "output": page and str(page),
        "markdown": markdown and str(markdown),
        "svg": sorted(str(path) for path in svg.iterdir()) if svg else None,
        "adapters": adapters,
        "size": page and page.stat().st_size,
    }


def _say(outputs: Outputs, adapters: int) -> None:
    from lorastack.files import bytes_in_words

    many = f"{adapters} adapter{'s' if adapters != 1 else ''}"
    for file in (outputs.page, outputs.markdown):
        if file:
            remark(f"{file}: {many}, {bytes_in_words(file.stat().st_size)}")
    if outputs.svg:
        count = len(list(outputs.svg.iterdir()))
        remark(f"{outputs.svg}: {count} picture{'s' if count != 1 else ''}")
