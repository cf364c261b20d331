"""``lorastack convert``: one adapter in another format, or as a program reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.bake import write_adapter
from lorastack.cli.console import echo_json, remark
from lorastack.cli.options import (
    AllowNonfinite,
    Base,
    DropExtras,
    Figures,
    Force,
    Ignore,
    Json,
    NoRecipe,
    Program,
    Quiet,
    Rename,
    StoredType,
    check_figures,
    parse_renames,
)
from lorastack.errors import ArgumentError

if TYPE_CHECKING:
    from lorastack.targets import Experts


def _formats() -> list[str]:
    from lorastack.targets import FORMATS

    return list(FORMATS)


def convert_command(
    adapter: Annotated[
        str,
        typer.Argument(metavar="IN", help="A file, a folder or a hub id, of any format.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="NAME.gguf, NAME.safetensors (kohya, ComfyUI, diffusers), or a folder (PEFT, MLX, diffusers).",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            autocompletion=_formats,
            help="peft, gguf, kohya, comfyui, diffusers or mlx; the ending of OUT says it where it can.",
        ),
    ] = None,
    program: Program = None,
    base: Base = None,
    select: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Convert the weights whose names match, as in 'unet.*'."),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            autocompletion=lambda: ["one-by-one", "fused"],
            help="How experts lie in the file, one-by-one or fused, where the target takes either.",
        ),
    ] = None,
    dtype: StoredType = None,
    no_recipe: NoRecipe = False,
    figures: Figures = False,
    drop_extras: DropExtras = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another format; whoever reads it computes the same updates.

    Examples:

    `lorastack convert ./zara zara.gguf --base ./base`

    `lorastack convert style.safetensors ./style --to peft --select 'lora_unet_*'`

    `lorastack convert ./zara ./for-vllm --for vllm --figures`
    """
    from lorastack.base import open_base
    from lorastack.converting.new_file import fitting, row_of
    from lorastack.files import check_output
    from lorastack.formats.provenance import sources_of
    from lorastack.recipe import load
    from lorastack.targets import room_for

    if figures:
        check_figures(output)
    row = row_of(output, to, program)
    check_output(output, force)
    lora = load(adapter, allow_nonfinite=allow_nonfinite, ignore=ignore or (), rename=parse_renames(rename))
    check_output(output, force, sources_of(lora))
    if select is not None:
        lora = lora.select(select)
    if drop_extras:
        lora = lora.without_extras()
    lora = fitting(lora, row, open_base(base) if base else None, _layout(experts))
    write_adapter(lora, output, dtype, force, row.format, recipe=not no_recipe, figures=figures)
    if as_json:
        echo_json({"output": str(output), "format": row.format, "weights": lora.num_adapters(), "rank": lora.rank})
        return
    remark(f"wrote {output}: {lora.num_adapters()} weights, as {row.title} reads it")
    if (room := room_for(row, lora.rank)) and lora.rank > 16:
        remark(f"its rank is {lora.rank}: start {row.title} with --max-lora-rank {room}")


def _layout(word: str | None) -> Experts | None:
    if word is None:
        return None
    if word not in ("one-by-one", "fused"):
        raise ArgumentError(f"--experts {word!r}: write one-by-one or fused")
    return "fused" if word == "fused" else "one by one"
