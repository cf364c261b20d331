"""``lorastack tune``: find the scales under which a base foretells texts best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.console import echo, echo_json, remark
from lorastack.cli.ending import interrupted_later
from lorastack.cli.options import (
    AllowNonfinite,
    Device,
    DropExtras,
    Force,
    Ignore,
    LokrRank,
    ModelType,
    Quiet,
    Rename,
    parse_renames,
)
from lorastack.errors import ArgumentError, Problems

if TYPE_CHECKING:
    from lorastack.torch import Tuned

#: A file of texts to foretell, which are all read at once.
MAX_TEXT = 1 << 28


def tune(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A Hugging Face folder or hub id, or a GGUF file.")],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:SCALE]...", help="Adapters or recipes, with the scales to begin with.", show_default=False
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option("--text", metavar="FILE", help="Passages to foretell, one on each line; may be repeated."),
    ],
    low: Annotated[float, typer.Option(help="The lowest scale to try.")] = -0.5,
    high: Annotated[float, typer.Option(help="The highest scale to try.")] = 1.5,
    trials: Annotated[int, typer.Option(min=3, help="Mixtures to score at most.")] = 60,
    seed: Annotated[int, typer.Option(help="Another seed searches another way; the same one finds the same.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="NAME.toml", help="Write the best stack there, as a recipe."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="NAME.html", help="Write a page with the score over the scales; needs plotly."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every trial.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep every trial there, in Optuna's own storage; a search that was stopped goes on from it.",
        ),
    ] = None,
    dtype: ModelType = "auto",
    device: Device = "auto",
    force: Force = False,
    drop_extras: DropExtras = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    quiet: Quiet = False,
) -> None:
    """Find the scales under which a base with adapters foretells texts best: the lowest perplexity.

    The search needs no gradients and never reloads anything. The recipe it writes is an adapter to every command.
    Ctrl-C ends the search with the best so far, which is printed and written as at its end.

    Examples:

    `lorastack tune ./my-model zara.gguf excited.gguf --text eval.txt -o best.toml --plot landscape.html`

    `lorastack tune base.gguf ./style:0.8 ./robot:0.2 --text eval.txt --low 0 --high 1 --trials 100`

    `lorastack tune ./my-model ./style ./robot --text eval.txt --trials 500 --resume search.log -o best.toml`

    `lorastack bake best.toml -o both.gguf`
    """
    import sys

    from lorastack.cli.missing import require_all
    from lorastack.cli.progress import step_bar
    from lorastack.files import whole_output
    from lorastack.recipe import Recipe, recipe_files

    _check_outputs(output, plot, force, text)
    texts = [line for file in text for line in _lines(file)]
    require_all("tune", *(["report"] if plot else []))
    with interrupted_later():
        from lorastack.torch import tune as search
        from lorastack.torch.generate import load_base

    recipe = Recipe.of_words(adapters, base)
    sources: list[str | Path] = [*recipe.sources, *recipe_files(adapters), *text]
    _check_outputs(output, plot, force, sources)
    entries = recipe.entries(
        allow_nonfinite=allow_nonfinite,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
        drop_extras=drop_extras,
    )
    model, tokenizer = load_base(base, dtype, device)
    with step_bar("searching the scales") as progress:
        tuned = search(
            model,
            entries,
            texts=texts,
            tokenizer=tokenizer,
            low=low,
            high=high,
            trials=trials,
            seed=seed,
            progress=progress,
            resume=resume,
            keep_best=True,
        )
    if output:
        best = tuned.recipe(base).seen_from(output.parent)
        with whole_output(output, force, sources=sources) as path:
            path.write_text(best.to_toml(), "utf-8")
    if plot:
        from lorastack.report.landscape import landscape

        with whole_output(plot, force, sources=sources) as path:
            path.write_text(landscape(tuned), "utf-8")
    if as_json:
        echo_json(_json(tuned))
    else:
        _print(tuned)
        for file in (output, plot):
            if file:
                remark(f"{file}: written")
    if tuned.stopped:
        way = f"--resume {resume} goes on from here" if resume else "with --resume FILE a search can go on"
        echo(f"stopped after {len(tuned.trials)} of {trials} trials; {way}", err=True)
        sys.exit(130)


def _check_outputs(output: Path | None, plot: Path | None, force: bool, sources: Sequence[str | Path]) -> None:
    """Refuse before a long search what could not be written after it."""
    from lorastack.files import check_output

    problems = Problems("the result cannot be written")
    for file, ending in ((output, ".toml"), (plot, ".html")):
        if file is None:
            continue
        if file.suffix != ending:
            problems.add(f"{file}: give it a name that ends with {ending}")
        try:
            check_output(file, force, sources)
        except ArgumentError as error:
            problems.add(error)
    problems.raise_any(ArgumentError)


def _lines(file: Path) -> list[str]:
    from lorastack.files import read_regular

    try:
        lines = [line.strip() for line in read_regular(file, MAX_TEXT, ArgumentError).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: the texts cannot be read: {error}") from error
    if not any(lines):
        raise ArgumentError(f"{file}: it has no text; write one passage on each line")
    return [line for line in lines if line]


def _json(tuned: Tuned) -> dict[str, Any]:
    return {
        "measure": tuned.measure,
        "scales": dict(tuned.scales),
        "score": tuned.score,
        "as_given": {"scales": dict(tuned.trials[0].scales), "score": tuned.equal},
        "base": tuned.base,
        "failed": tuned.failed,
        "stopped": tuned.stopped,
        "trials": [{"scales": dict(trial.scales), "score": trial.score} for trial in tuned.trials],
    }


def _print(tuned: Tuned) -> None:
    from lorastack.cli.tables import Grid, fixed, show

    given = tuned.trials[0].scales
    rows = [
        (label, *(f"{scale:g}" for scale in scales.values()), fixed(score, 4))
        for label, scales, score in (
            ("best", tuned.scales, tuned.score),
            ("as given", given, tuned.equal),
            ("base", dict.fromkeys(given, 0.0), tuned.base),
        )
    ]
    show(Grid(("", *tuned.scales, tuned.measure), rows))
    failed = f", {tuned.failed} without a finite score" if tuned.failed else ""
    remark(f"{len(tuned.trials)} trials{failed}")
