"""``lorastack bake``: a weighted stack as one ordinary adapter file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lorastack.base import open_base
from lorastack.cli.app import Adapters, AllowNonfinite, Base, Force, Ignore, app
from lorastack.cli.progress import byte_bar
from lorastack.errors import ArgumentError
from lorastack.files import check_output
from lorastack.formats import save
from lorastack.recipe import Recipe
from lorastack.target import Naming


@app.command()
def bake(
    adapters: Adapters,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="NAME.gguf for a GGUF adapter, else a folder for PEFT."),
    ],
    base: Base = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="f32, f16, bf16, or for GGUF q8_0; factors keep theirs when not given."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The new adapter's name.")] = None,
    drop_extras: Annotated[
        bool,
        typer.Option(
            "--drop-extras",
            help="Leave out what a low-rank adapter cannot hold: DoRA magnitudes, biases, saved modules.",
        ),
    ] = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
) -> None:
    """Bake a weighted stack into one adapter, exactly: llama.cpp, PEFT and vLLM use it like any other.

    GGUF and PEFT adapters bake into one when `--base` names the model they were trained on (a Hugging Face
    folder or hub id, or a GGUF file). The output carries its recipe: sources, hashes and scales.

    Examples:

    `lorastack bake zara.gguf:0.7 excited.gguf:0.3 -o both.gguf`

    `lorastack bake zara.gguf:0.7 ./robot:0.5 --base ./my-model -o both --dtype f16`

    `lorastack bake recipe.toml -o both.gguf`
    """
    check_output(output, force)
    as_gguf = output.suffix == ".gguf"
    recipe = Recipe.of_words(adapters)
    source = base or recipe.base
    model = open_base(source) if source else None
    naming: Naming | None = ("gguf" if as_gguf else "hf") if model else None
    stack = recipe.stack(
        base=model, naming=naming, allow_nonfinite=allow_nonfinite, ignore=ignore or (), drop_extras=drop_extras
    )
    if as_gguf and stack.naming == "hf":
        raise ArgumentError(f"{output}: these adapters have Hugging Face names; give --base to convert them to GGUF's")
    if not as_gguf and stack.naming == "gguf":
        raise ArgumentError(
            f"{output}: these adapters have GGUF names; write a .gguf file, or give --base to convert them for PEFT"
        )
    lora = stack.bake(base=model, name=name or output.stem)
    total = sum(
        math.prod(f.shape) * {"f32": 4, "q8_0": 1}.get(dtype or f.stored.lower(), 2)
        for delta in lora.adapters.values()
        for f in delta.factors
    )
    with byte_bar(f"writing {output.name}", total) as advance:
        save(lora, output, dtype=dtype, force=force, progress=advance)
    ranks = sorted({delta.rank for delta in lora.adapters.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    typer.echo(f"{output}: {len(stack)} adapters as one, {lora.num_adapters()} weights of rank {span}")
