"""``lorastack resize``: one adapter at another rank."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack.cli.bake import bake
from lorastack.cli.cutting import Energy, Rank, Tolerance
from lorastack.cli.options import (
    AdapterOutput,
    AllowMixedBases,
    AllowNonfinite,
    Base,
    DropExtras,
    Figures,
    FileFormat,
    Force,
    Ignore,
    Json,
    LokrRank,
    NoRecipe,
    Quiet,
    Rename,
    StoredType,
)
from lorastack.errors import ArgumentError


def resize(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="A file or a folder of any format, or a hub id.", show_default=False),
    ],
    output: AdapterOutput,
    rank: Rank = None,
    energy: Energy = None,
    tolerance: Tolerance = None,
    base: Base = None,
    dtype: StoredType = None,
    no_recipe: NoRecipe = False,
    figures: Figures = False,
    drop_extras: DropExtras = False,
    force: Force = False,
    allow_mixed_bases: AllowMixedBases = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    format: FileFormat = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter at a lower rank: each weight the best approximation there is, its error said.

    Examples:

    `lorastack resize zara.gguf --rank 4 -o zara-small.gguf`

    `lorastack resize ./zara --rank 2,4,8 --energy 0.95 -o ./zara-small --figures`
    """
    if rank is None and energy is None and tolerance is None:
        raise ArgumentError("say how far to go: --rank 8, --energy 0.99 or --tolerance 1e-3")
    bake(
        [adapter],
        output,
        base=base,
        dtype=dtype,
        no_recipe=no_recipe,
        figures=figures,
        rank=rank,
        energy=energy,
        tolerance=tolerance,
        drop_extras=drop_extras,
        force=force,
        allow_mixed_bases=allow_mixed_bases,
        allow_nonfinite=allow_nonfinite,
        ignore=ignore,
        rename=rename,
        lokr_rank=lokr_rank,
        format=format,
        as_json=as_json,
        quiet=quiet,
    )
