"""What a stack can be made of: adapters alone, with scales, under names of the caller's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError

#: An adapter at scale 1, or with its scale.
One: TypeAlias = LoadedLora | tuple[LoadedLora, float]
Given: TypeAlias = Iterable[One] | Mapping[LoadedLora, float] | Mapping[str, One]


def pairs_of(given: Given) -> Iterator[tuple[LoadedLora, float]]:
    """Adapters with their scales, however they are given; `LoraStack.push` checks both.

    Raises
    ------
    ArgumentError
        When something among them is neither an adapter nor a pair.
    """
    if isinstance(given, LoadedLora):
        raise ArgumentError("a stack is made of a list of adapters; put the one in a list")
    if not isinstance(given, Mapping):
        yield from map(_pair, given)
        return
    for key, value in given.items():
        if isinstance(key, str):
            lora, scale = _pair(value)
            yield lora.renamed(key), scale
        else:
            yield _pair((key, value))


def _pair(one: Any) -> tuple[LoadedLora, float]:
    if isinstance(one, LoadedLora):
        return one, 1.0
    if isinstance(one, (tuple, list)) and len(one) == 2:
        return one[0], one[1]
    what = f"{len(one)} values" if isinstance(one, (tuple, list)) else type(one).__name__
    raise ArgumentError(f"a stack is made of adapters, or of pairs of adapter and scale; got {what}")
