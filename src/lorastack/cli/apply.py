"""``lorastack apply``: the sum of the updates at one weight, applied to an array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.console import echo_json, remark
from lorastack.cli.options import (
    Adapters,
    AllowMixedBases,
    AllowNonfinite,
    Base,
    DropExtras,
    Force,
    Ignore,
    Json,
    LokrRank,
    Quiet,
    Rename,
    parse_renames,
)

if TYPE_CHECKING:
    import numpy as np

    from lorastack.core.stack import LoraStack


def apply(
    adapters: Adapters,
    tensor: Annotated[str, typer.Option("--tensor", "-t", metavar="NAME", help="The weight, by its own name.")],
    source: Annotated[Path, typer.Option("--input", "-i", metavar="X.npy", help="The input, [..., in].")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="Y.npy", help="Where the sum goes, [..., out].")],
    base: Base = None,
    drop_extras: DropExtras = False,
    force: Force = False,
    allow_mixed_bases: AllowMixedBases = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Apply the stack's sum at one weight to an array: `sum of scale * scaling * B @ A @ x`.

    Examples:

    `lorastack apply zara.gguf:0.7 excited.gguf:0.3 --tensor blk.0.attn_q.weight --input x.npy -o y.npy`

    `lorastack apply ./zara ./robot:0.5 -t model.layers.0.self_attn.q_proj.weight -i x.npy -o y.npy`
    """
    import numpy as np

    from lorastack.algebra.entries import check_fit, entries_of
    from lorastack.files import check_output, whole_output
    from lorastack.recipe import Recipe, recipe_files

    check_output(output, force)
    recipe = Recipe.of_words(adapters, base)
    sources: list[str | Path] = [*recipe.sources, *recipe_files(adapters), source]
    check_output(output, force, sources)
    model = recipe.open_base()
    stack = recipe.stack(
        base=model,
        allow_nonfinite=allow_nonfinite,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
        drop_extras=drop_extras,
    )
    entries = entries_of(stack, model, "apply", allow_mixed_bases)
    if model is not None:
        check_fit(entries, model)
    x = _read_array(source)
    y = stack.apply(tensor, x, _out_features(stack, tensor))
    with whole_output(output, force, sources=sources) as path, path.open("wb") as file:
        np.save(file, y)
    covering = sum(tensor in lora.adapters for lora, _ in stack.entries)
    if as_json:
        shape = list(y.shape)
        said = {"output": str(output), "weight": tensor, "dtype": str(y.dtype), "shape": shape, "adapters": covering}
        echo_json(said)
    else:
        remark(f"{output}: {y.dtype} {list(y.shape)}, the sum of {covering} of {len(stack)} adapters at {tensor}")


def _read_array(path: Path) -> np.ndarray:
    import numpy as np

    from lorastack.errors import ArgumentError
    from lorastack.files import open_regular

    with open_regular(path, ArgumentError) as file:
        try:
            array = np.load(file, allow_pickle=False)
        except Exception as error:  # a header is Python's syntax, a shape may be any number, a zip archive anything
            raise ArgumentError(f"{path}: cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = array.dtype if isinstance(array, np.ndarray) else "several arrays"
        raise ArgumentError(f"{path}: it has {kind}, expected one array of numbers")
    return array


def _out_features(stack: LoraStack, tensor: str) -> int:
    """The output's length as the adapters have it; a name that none has is a mistake on a command line."""
    for _, delta in stack.terms(tensor):
        return delta.out_features
    from difflib import get_close_matches

    from lorastack.errors import UnknownNameError

    near = get_close_matches(tensor, stack.weights, n=3, cutoff=0.3) or list(stack.weights[:3])
    raise UnknownNameError(
        f"no adapter has a weight {tensor!r}; the nearest of {len(stack.weights)} are: {', '.join(near)}"
    )
