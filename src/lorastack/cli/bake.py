"""``lorastack bake``: a weighted stack as one ordinary adapter file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.blocks import BlockWeights, with_block_weights
from lorastack.cli.console import echo_json, remark
from lorastack.cli.cutting import Energy, Rank, Tolerance, loss_of, parse_ranks, parse_sweep
from lorastack.cli.options import (
    AdapterOutput,
    Adapters,
    AllowMixedBases,
    AllowNonfinite,
    Base,
    Density,
    DropExtras,
    Figures,
    FileFormat,
    Force,
    Ignore,
    Json,
    LokrRank,
    Method,
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
    from lorastack.core.adapter import LoadedLora
    from lorastack.core.target import Naming
    from lorastack.formats.writers import Format


def bake(
    adapters: Adapters,
    output: AdapterOutput,
    base: Base = None,
    dtype: StoredType = None,
    no_recipe: NoRecipe = False,
    figures: Figures = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The new adapter's name.")] = None,
    method: Method = "cat",
    rank: Rank = None,
    energy: Energy = None,
    tolerance: Tolerance = None,
    density: Density = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of dare's random masks.")] = 0,
    program: Program = None,
    scales: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO:STEP", help="Write one file for each merge coefficient, as in 0.2:1.0:0.1: OUT-0.2, ..."
        ),
    ] = None,
    drop_extras: DropExtras = False,
    force: Force = False,
    allow_mixed_bases: AllowMixedBases = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lbw: BlockWeights = None,
    lokr_rank: LokrRank = None,
    format: FileFormat = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bake a weighted stack into one adapter, exactly: llama.cpp, PEFT and vLLM use it like any other.

    GGUF and PEFT adapters bake into one when `--base` names the model they were trained on (a Hugging Face
    folder or hub id, or a GGUF file). The output carries its recipe: sources, hashes and scales.

    Examples:

    `lorastack bake zara.gguf:0.7 excited.gguf:0.3 -o both.gguf`

    `lorastack bake zara.gguf:0.7 ./robot:0.5 --base ./my-model -o both --dtype f16`

    `lorastack bake recipe.toml -o both.gguf`

    `lorastack bake ./zara:0.7 ./robot:0.5 -o both --figures`

    With `--rank`, `--energy` or `--tolerance` each weight is the best approximation of the sum, through a truncated
    SVD; the error is said, and stored in the file. Methods: `cat` and `linear` (the weighted sum), `svd`, and
    `ties`, `dare`, `dare_ties` or `magnitude_prune`, each `@dense`, `@knots` or `@core`.

    `lorastack bake zara.gguf:0.7 excited.gguf:0.3 --rank 8 -o both.gguf`

    `lorastack bake ./zara ./excited --method ties@knots --density 0.2 --scales 0.2:1.0:0.2 -o ./both`
    """
    from lorastack.algebra.bake import with_coefficient
    from lorastack.cli.progress import step_bar
    from lorastack.converting.new_file import fitting, row_of
    from lorastack.files import check_output
    from lorastack.recipe import Recipe, recipe_files
    from lorastack.targets import format_of

    if figures:
        check_figures(output)
    outputs = _outputs(output, parse_sweep(scales))
    for path, _ in outputs:
        check_output(path, force)
    row = row_of(output, format, program) if program else None
    written_as = row.format if row else format_of(format).format if format else None
    as_gguf = written_as == "gguf" if written_as else output.suffix == ".gguf"
    recipe = Recipe.of_words(adapters, base)
    for path, _ in outputs:
        check_output(path, force, recipe.sources + recipe_files(adapters))
    model = recipe.open_base()
    naming: Naming | None = ("gguf" if as_gguf else "hf") if model else None
    stack = recipe.stack(
        base=model,
        naming=naming,
        allow_nonfinite=allow_nonfinite,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
        drop_extras=drop_extras,
    )
    stack = with_block_weights(stack, lbw)
    if as_gguf and stack.naming == "hf":
        raise ArgumentError(f"{output}: these adapters have Hugging Face names; give --base to convert them to GGUF's")
    if not as_gguf and stack.naming == "gguf":
        raise ArgumentError(
            f"{output}: these adapters have GGUF names; write a .gguf file, or give --base to convert them for PEFT"
        )
    with step_bar("combining") as step:
        baked = stack.bake(
            base=model,
            name=name or output.stem,
            method=method,
            rank=parse_ranks(rank),
            energy=energy,
            tolerance=tolerance,
            density=density,
            seed=seed,
            allow_mixed_bases=allow_mixed_bases,
            progress=step,
        )
    written: list[dict[str, Any]] = []
    for path, coefficient in outputs:
        lora = baked if coefficient is None else with_coefficient(baked, coefficient)
        if row:
            lora = fitting(lora, row, model)
        write_adapter(lora, path, dtype, force, written_as, recipe=not no_recipe, figures=figures)
        written.append(_numbers(lora, path, coefficient, len(stack)))
        if not as_json:
            remark(f"{path}: {_words(lora, len(stack))}")
    if as_json:
        echo_json(written)
    elif loss := loss_of(baked):
        remark(loss)


def _outputs(output: Path, coefficients: list[float]) -> list[tuple[Path, float | None]]:
    """The output of every merge coefficient, named after it."""
    suffix = output.suffix if output.suffix in (".gguf", ".safetensors") else ""
    stem = output.name.removesuffix(suffix)
    return [(output.with_name(f"{stem}-{c:g}{suffix}"), c) for c in coefficients] or [(output, None)]


def _numbers(lora: LoadedLora, path: Path, coefficient: float | None, adapters: int) -> dict[str, Any]:
    ranks = sorted({delta.rank for delta in lora.adapters.values()})
    return {
        "output": str(path),
        "name": lora.name,
        "adapters": adapters,
        "coefficient": coefficient,
        "weights": lora.num_adapters(),
        "ranks": ranks,
        "error": lora.made.get("error"),
        "errors": lora.made.get("errors"),
    }


def write_adapter(
    lora: LoadedLora,
    output: Path,
    dtype: str | None,
    force: bool,
    format: Format | None = None,
    recipe: bool = True,
    figures: bool = False,
) -> None:
    """Save an adapter, with a bar."""
    from lorastack.cli.progress import byte_bar
    from lorastack.formats import save

    total = sum(
        math.prod(f.shape) * {"f32": 4, "q8_0": 1}.get(dtype or f.stored.lower(), 2)
        for delta in lora.adapters.values()
        for f in delta.factors
    )
    with byte_bar(f"writing {output.name}", total) as advance:
        how: dict[str, Any] = {"recipe": recipe, "figures": figures, "progress": advance}
        save(lora, output, format=format, dtype=dtype, force=force, **how)


def _words(lora: LoadedLora, adapters: int) -> str:
    ranks = sorted({delta.rank for delta in lora.adapters.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    many = f"{adapters} adapters as one" if adapters != 1 else "one adapter"
    return f"{many}, {lora.num_adapters()} weights of rank {span}"
