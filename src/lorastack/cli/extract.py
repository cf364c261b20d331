"""``lorastack extract``: the difference of two models as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.bake import write_adapter
from lorastack.cli.console import echo_json, remark
from lorastack.cli.cutting import Energy, Rank, Tolerance, loss_of, parse_ranks
from lorastack.cli.options import AdapterOutput, Figures, Force, Json, NoRecipe, Quiet, StoredType, check_figures
from lorastack.errors import ArgumentError

if TYPE_CHECKING:
    from lorastack.core.adapter import LoadedLora

#: What is listed in `made`, in words.
_LISTED = {
    "rest": "changed, and not low-rank",
    "reshaped": "of another shape",
    "added": "only in the fine-tuned model",
    "missing": "only in the base",
    "unsaved": "has no place in an adapter",
}
#: How many names a remark has.
_NAMED = 3


def extract_command(
    finetuned: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNED",
            help="The fine-tuned model: a Hugging Face folder, hub id or GGUF file.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model it was trained from, of the same kind.", show_default=False)
    ],
    output: AdapterOutput,
    rank: Rank = None,
    energy: Energy = None,
    tolerance: Tolerance = None,
    exact: Annotated[bool, typer.Option("--exact", help="The full SVD of every difference: far slower.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random sketches.")] = 0,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Embeddings and heads too, as low-rank updates.")
    ] = False,
    save_rest: Annotated[
        bool,
        typer.Option("--save-rest", help="Save whole what changed and is not low-rank: norms, biases, embeddings."),
    ] = False,
    dtype: StoredType = None,
    no_recipe: NoRecipe = False,
    figures: Figures = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The new adapter's name.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Extract an adapter from a fine-tuned model: the difference to its base at a low rank.

    One weight is read at a time. The error of each is exact, said, and stored in the file. What changed and is not
    low-rank is listed, or saved whole with `--save-rest`.

    Examples:

    `lorastack extract ./my-finetune ./my-model --rank 32 -o ./adapter --figures`

    `lorastack extract ./my-finetune ./my-model --energy 0.99 --save-rest -o ./adapter --dtype bf16`

    `lorastack extract tuned.gguf my-model.gguf --rank 16 -o adapter.gguf`
    """
    from lorastack.base import convert_names, open_base
    from lorastack.cli.progress import step_bar
    from lorastack.extracting import extract
    from lorastack.files import check_apart, check_output

    if figures:
        check_figures(output)
    check_output(output, force, [finetuned, base])
    check_apart(output, [finetuned, base], "a model")
    ranks = parse_ranks(rank)
    as_gguf = output.suffix == ".gguf"
    if as_gguf and save_rest:
        raise ArgumentError(f"{output}: a GGUF adapter has no place for whole weights; leave --save-rest out")
    with step_bar("comparing") as step:
        lora = extract(
            finetuned,
            base,
            ranks,
            energy=energy,
            tolerance=tolerance,
            exact=exact,
            seed=seed,
            embeddings=embeddings,
            save_rest=save_rest,
            name=name or output.stem,
            progress=step,
        )
    if as_gguf and lora.naming == "hf":
        lora = convert_names(lora, open_base(base), "gguf")
    elif not as_gguf and lora.naming == "gguf":
        raise ArgumentError(f"{output}: these models have GGUF names, and so has the adapter; write a .gguf file")
    write_adapter(lora, output, dtype, force, recipe=not no_recipe, figures=figures)
    if as_json:
        echo_json(_numbers(lora, output))
    else:
        _say(lora, output)


def _numbers(lora: LoadedLora, output: Path) -> dict[str, Any]:
    listed = {key: lora.made.get(key, [] if key in ("added", "missing", "unsaved") else {}) for key in _LISTED}
    return {
        "output": str(output),
        "name": lora.name,
        "weights": lora.num_adapters(),
        **{key: lora.made[key] for key in ("error", "errors", "ranks")},
        **listed,
    }


def _say(lora: LoadedLora, output: Path) -> None:
    ranks = sorted(set(lora.made["ranks"].values()))
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    remark(f"{output}: {lora.num_adapters()} weights of rank {span}")
    remark(loss_of(lora))
    for key, what in _LISTED.items():
        names = list(lora.made.get(key, ()))
        if names:
            more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            remark(f"{what}: {', '.join(names[:_NAMED])}{more}")
    if lora.made.get("rest") and not lora.extras:
        remark("what is not low-rank is not in the adapter; --save-rest saves it whole")
