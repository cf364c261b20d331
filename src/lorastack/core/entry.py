"""Entry: one adapter on a stack; and what a stack holds of all of them at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lorastack.core.adapter import LoadedLora
from lorastack.core.extras import KINDS, extras_at
from lorastack.core.packed import PackedWeight
from lorastack.errors import UnsupportedError
from lorastack.ways import Way, drop_extras, ways


class Entry(NamedTuple):
    """One pushed adapter: its name on this stack, the adapter, its scale."""

    name: str
    lora: LoadedLora
    scale: float


class Now(NamedTuple):
    """What a stack holds at one time, and what was packed of it."""

    entries: tuple[Entry, ...]
    packs: dict[str, PackedWeight | None]


def pack_of(name: str, entries: Sequence[Entry], dtype: type) -> PackedWeight | None:
    """The sum of the entries at a weight, in the type that it is computed in; None when none has that weight.

    Raises
    ------
    UnsupportedError
        Listing every extra that acts there, and is no low-rank update.
    """
    found = [(entry, entry.lora.get(name)) for entry in entries]
    terms = [(entry.scale, delta) for entry, delta in found if delta is not None]
    unmet = [
        f"{entry.name}: {name} has {KINDS[kind]}" for entry, _ in found for kind in extras_at(entry.lora.extras, name)
    ]
    if unmet:
        raise UnsupportedError(
            "only low-rank updates can be applied to an array"
            + ways(
                Way("attach the stack to a model with lorastack.torch", "give prompts to `lorastack run`"),
                drop_extras(),
                "take the adapter out",
            ),
            unmet,
        )
    names = [entry.name for entry, delta in found if delta is not None]
    return PackedWeight(terms, names, dtype) if terms else None
