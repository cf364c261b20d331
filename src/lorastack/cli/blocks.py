"""``--lbw``: block weights of image adapters, told as the patterns that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.console import remark
from lorastack.errors import ArgumentError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from lorastack.core.stack import LoraStack

BlockWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--lbw",
        metavar="NAME=WEIGHTS",
        help="Block weights of an image adapter, by its name: numbers with commas (17 for SD 1.5, 12 or 20 for SDXL, "
        "26 for both, 57 or 61 for Flux), or ALL, NONE, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL; may be repeated.",
    ),
]


def with_block_weights(stack: LoraStack, words: list[str] | None) -> LoraStack:
    """The stack with ``NAME=WEIGHTS`` words obeyed; says which weights get which factor.

    Raises
    ------
    ArgumentError
        When a word is none of these, or its numbers do not fit the adapter's blocks.
    UnknownNameError
        When no adapter has that name.
    """
    from lorastack.base.blocks import block_weights
    from lorastack.core.stack import LoraStack

    entries = dict(zip(stack.names, stack.entries, strict=True))
    for word in words or []:
        name, _, weights = word.rpartition("=")
        if not name:
            raise ArgumentError(
                f"--lbw {word!r}: write NAME=WEIGHTS, as in zara=MIDD; adapters are {', '.join(entries)}"
            )
        if name not in entries:
            near = did_you_mean(name, entries)
            raise UnknownNameError(f"--lbw {word!r}: no adapter is named {name}; there are {', '.join(entries)}{near}")
        lora, scale = entries[name]
        patterns = block_weights(lora, weights)
        for pattern, factor in patterns.items():
            remark(f"{name}: {pattern} times {factor:g}")
        entries[name] = lora.scaled(patterns), scale
    changed = LoraStack(list(entries.values()))
    for adapter in stack.adapters:
        changed.push_adapter(adapter)
    return changed
