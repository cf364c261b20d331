"""``lorastack merge``: a weighted stack in the weights of a new base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.blocks import BlockWeights, with_block_weights
from lorastack.cli.console import echo_json, remark
from lorastack.cli.cutting import Energy, Rank, Tolerance, parse_ranks
from lorastack.cli.options import (
    Adapters,
    AllowNonfinite,
    Density,
    DropExtras,
    Force,
    Ignore,
    Json,
    LokrRank,
    Method,
    Quiet,
    Rename,
    parse_renames,
)

if TYPE_CHECKING:
    from lorastack.merging import Merged

#: Below this part of an update, most of it is gone.
_LITTLE = 0.5


def _outtypes() -> list[str]:
    from lorastack.merging.packing import packable_types

    return [name.lower() for name in packable_types()]


def merge_command(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="A folder of transformers or diffusers, a hub id, a checkpoint of Stable Diffusion, or a GGUF file.",
            show_default=False,
        ),
    ],
    adapters: Adapters,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="A new folder; of a base that is one file NAME.safetensors or NAME.gguf, or a folder for its parts.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say how much would be kept, and write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every changed weight back, and hold it against the adapters.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Sum in float64.")] = False,
    round_: Annotated[
        str,
        typer.Option(
            "--round",
            metavar="WAY",
            autocompletion=lambda: ["nearest", "stochastic"],
            help="nearest, or stochastic, which keeps the mean.",
        ),
    ] = "nearest",
    seed: Annotated[int, typer.Option(metavar="N", help="Of stochastic rounding, and of dare's random masks.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Hard links for files that stay as they are.")] = False,
    outtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            autocompletion=_outtypes,
            help="GGUF: the type of changed weights, as in q8_0; each its own when not given.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="GGUF: an importance matrix, which some types are packed by."),
    ] = None,
    method: Method = "cat",
    rank: Rank = None,
    energy: Energy = None,
    tolerance: Tolerance = None,
    density: Density = None,
    drop_extras: DropExtras = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lbw: BlockWeights = None,
    lokr_rank: LokrRank = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a weighted stack into its base: a new base that needs no adapters. The old one is not touched.

    All updates are summed and rounded once, to the type that each weight has. Weights of a few bits keep little of a
    small update: `--dry-run` says how much, and then an adapter does better at run time.

    Examples:

    `lorastack merge ./my-model zara:0.7 robot:0.3 -o ./merged`

    `lorastack merge my-model.gguf zara.gguf:0.7 -o merged.gguf --verify`

    `lorastack merge sd15.safetensors ink.safetensors:0.7 -o new.safetensors --lbw ink=MIDD`

    `lorastack merge ./my-model zara robot --method ties@knots --rank 32 -o ./merged --dry-run`
    """
    from lorastack.files import check_output
    from lorastack.merging import merge
    from lorastack.merging.new_base import open_whole
    from lorastack.recipe import Recipe, recipe_files

    check_output(output, force)
    recipe = Recipe.of_words(adapters, base)
    check_output(output, force, [*recipe.sources, *recipe_files(adapters)])
    model = open_whole(base)
    stack = recipe.stack(
        base=model,
        naming=model.naming,
        allow_nonfinite=allow_nonfinite,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
        drop_extras=drop_extras,
    )
    stack = with_block_weights(stack, lbw)
    with _bars() as progress:
        done = merge(
            model,
            stack,
            output,
            exact=exact,
            round=round_,
            seed=seed,
            method=method,
            rank=parse_ranks(rank),
            energy=energy,
            tolerance=tolerance,
            density=density,
            outtype=outtype,
            imatrix=imatrix,
            link=link,
            verify=verify,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    if as_json:
        echo_json(_numbers(done, output))
    else:
        _say(done, output)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each part of the work: weights, or bytes with the time that is left."""
    from contextlib import ExitStack

    from lorastack.cli.progress import byte_bar, step_bar

    with ExitStack() as open_:
        now, before = "", 0
        steps: Callable[[int, int], None] | None = None
        advance: Callable[[int], None] | None = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal now, before, steps, advance
            if what != now:
                open_.close()
                now, before, steps, advance = what, 0, None, None
                if what == "writing":
                    advance = open_.enter_context(byte_bar(what, total))
                else:
                    steps = open_.enter_context(step_bar(what))
            if advance:
                advance(done - before)
                before = done
            elif steps:
                steps(done, total)

        yield progress


def _numbers(done: Merged, output: Path) -> dict[str, Any]:
    return {
        "output": None if done.out is None else str(output),
        "tensors": done.tensors,
        "changed": done.changed,
        "size": done.size,
        "written": done.written,
        "kept": [one._asdict() for one in done.survivals],
        "verified": [one._asdict() for one in done.verified],
        "left_out": [str(path) for path in done.left_out],
    }


def _say(done: Merged, output: Path) -> None:
    from lorastack.files import bytes_in_words
    from lorastack.merging.card import by_kind

    changed = f"{done.changed} of {done.tensors} tensors changed"
    if done.out is None:
        remark(
            f"{output} would have {bytes_in_words(done.size)}, {changed}; {bytes_in_words(done.written)} are written"
        )
    else:
        linked = done.size - done.written
        links = f", {bytes_in_words(linked)} of it hard links" if linked else ""
        remark(f"{output}: {bytes_in_words(done.size)}{links}, {changed}")
    for kind, count, error, kept in by_kind(done.survivals):
        remark(f"{kind}: {kept:.1%} of the updates of {count} weights is kept, with an error of {error:.2g}")
    if any(kept < _LITTLE for *_, kept in by_kind(done.survivals)):
        remark(
            "most of the update is lost to rounding: use the adapters at run time, merge into the model that this one "
            "was made from, or give --round stochastic or another --outtype"
        )
    if done.verified:
        worst = max(done.verified, key=lambda one: one.error)
        remark(f"verified: {len(done.verified)} weights, the error is at most {worst.error:.2g} (at {worst.weight})")
    if done.left_out:
        names = ", ".join(path.name for path in done.left_out[:3])
        remark(f"not carried along: {names}{', ...' if len(done.left_out) > 3 else ''}, other forms of the old weights")
