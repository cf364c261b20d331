"""Options that say where a truncated SVD ends, and the words about what it lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.errors import ArgumentError

if TYPE_CHECKING:
    from lorastack.core.adapter import LoadedLora

Rank = Annotated[
    str | None,
    typer.Option(
        metavar="R[,R...]",
        help="The rank of every weight, at most; of several, as in `8,16,32`, the smallest that keeps --energy or "
        "--tolerance.",
    ),
]
Energy = Annotated[
    float | None, typer.Option(metavar="E", help="The part of the squared norm to keep in each weight, as in 0.99.")
]
Tolerance = Annotated[
    float | None, typer.Option(metavar="T", help="The relative error to stay within in each weight, as in 1e-3.")
]


def parse_ranks(text: str | None) -> int | list[int] | None:
    """``"16"`` or ``"8,16,32"`` as numbers."""
    if text is None:
        return None
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--rank is {text!r}, expected whole numbers, as in 16 or 8,16,32") from None
    return ranks[0] if len(ranks) == 1 else ranks


def parse_sweep(text: str | None) -> list[float]:
    """``"0.2:1.0:0.1"`` (from, to, step) or ``"0.5,1"`` as the numbers it means; empty for None.

    >>> parse_sweep("0.2:0.4:0.1"), parse_sweep("0.5,1")
    ([0.2, 0.3, 0.4], [0.5, 1.0])
    """
    if text is None:
        return []
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
        count = round((last - first) / step) + 1
        if step <= 0 or not 1 <= count <= 1000:
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ArgumentError(f"--scales is {text!r}, expected FROM:TO:STEP, as in 0.2:1.0:0.1, or a list") from None
    return [round(first + n * step, 10) for n in range(count)]


def loss_of(lora: LoadedLora) -> str:
    """What was lost, in words; empty where nothing was."""
    errors = lora.made.get("errors")
    if not errors:
        return ""
    worst = max(errors, key=lambda weight: errors[weight])
    return f"relative error {lora.made['error']:.3g} overall, at most {errors[worst]:.3g} (at {worst})"
