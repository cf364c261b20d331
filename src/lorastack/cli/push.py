"""``lorastack push``: an adapter, or what a mixture bakes to, on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack.cli.console import echo_json, remark
from lorastack.cli.options import Base, Json, Quiet, StoredType


def push_command(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:SCALE]...", help="Adapters with scales, or recipes.", show_default=False),
    ],
    repo: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository, made if need be.")],
    base: Base = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that is not there yet private.")
    ] = False,
    dtype: StoredType = None,
    figures: Annotated[
        bool | None,
        typer.Option(
            "--figures/--no-figures",
            help="Draw norms, singular values and cosines for the card, or not; drawn where plotly is installed.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an adapter, or several baked into one, with a model card.

    Examples:

    `lorastack push ./zara --to me/zara`

    `lorastack push zara:0.7 excited:0.3 --to me/zara-excited --private`

    `lorastack push ./zara --to me/zara --no-figures`
    """
    from lorastack.cli.missing import require_all
    from lorastack.pushing import can_draw, push_to_hub
    from lorastack.recipe import load_stack

    if figures:
        require_all("report")
    stack = load_stack(adapters, base=base, naming="hf")
    lora, scale = stack.entries[0]
    alone = len(stack) == 1 and scale == 1
    lora = lora if alone else stack.bake(name=repo.rpartition("/")[2])
    address = push_to_hub(lora, repo, private=private, dtype=dtype, figures=figures)
    if as_json:
        echo_json({"address": address, "weights": lora.num_adapters(), "rank": lora.rank})
        return
    if figures is None and not can_draw():
        remark("the card has no figures: plotly draws them, which `pip install 'lorastack[report]'` brings")
    remark(f"pushed {lora.num_adapters()} weights of rank {lora.rank} to {address}")
