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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an adapter, or several baked into one, with a model card.

    Examples:

    `lorastack push ./zara --to me/zara`

    `lorastack push zara:0.7 excited:0.3 --to me/zara-excited --private`
    """
    from lorastack.pushing import push_to_hub
    from lorastack.recipe import load_stack

    stack = load_stack(adapters, base=base, naming="hf")
    lora, scale = stack.entries[0]
    alone = len(stack) == 1 and scale == 1
    lora = lora if alone else stack.bake(name=repo.rpartition("/")[2])
    address = push_to_hub(lora, repo, private=private, dtype=dtype)
    if as_json:
        echo_json({"address": address, "weights": lora.num_adapters(), "rank": lora.rank})
        return
    remark(f"pushed {lora.num_adapters()} weights of rank {lora.rank} to {address}")
