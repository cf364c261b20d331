"""Settle: an adapter under the names that a base has for its weights, whatever save the adapter's own are from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from lorastack.base.experts import LAYERS, beside, fused, halves, one_of, single, together
from lorastack.base.extras import extras_at_places
from lorastack.base.foreign import Place, delta_at
from lorastack.base.model import BaseModel
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import NamingError, Problems

_Build = Callable[[], LoraDelta]


def settle(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """The same adapter, each weight under the base's own name; what has none there keeps its name.

    Knows transformers' renamings, the prefix of a backbone saved by itself, experts one by one or in one parameter,
    and the names of `foreign`. Nothing is read.

    Raises
    ------
    NamingError
        Listing every weight that two of the adapter's are.
    """
    named = lora.naming == base.naming or (lora.naming == "kohya" and base.naming == "hf")
    if not named or (all(name in base.shapes for name in lora.adapters) and _extras_fit(lora, base)):
        return lora
    found = _Found()
    groups: dict[str, dict[tuple[str, int], str]] = {}
    for name in lora.adapters:
        own, one = base.own_name(name), single(name)
        if one and (holder := own if own and fused(own) else None if own else _holder(base, one[0], one[2])):
            groups.setdefault(holder, {})[one[2], one[1]] = name
        elif own is not None:
            found.add(own, name, partial(_at, lora, name, Place(own), base))
        elif places := base.foreign.find(name):
            for place in places:
                found.add(place.weight, name, partial(_at, lora, name, place, base))
        elif (whole := fused(name)) and (singles := _singles(base, *whole)):
            for part, number, own in singles:
                found.add(own, name, partial(_taken, lora, name, part, number))
        else:
            found.add(name, name, partial(lora.adapters.__getitem__, name))
    for holder, members in groups.items():
        first = next(iter(members.values()))
        found.add(holder, first, partial(_held, lora, base, holder, members))
    found.problems.raise_any(NamingError)
    return replace(
        lora,
        adapters=LazyDeltas(found.builds, lambda _, build: build()),
        extras=extras_at_places(lora, base),
        naming=base.naming,
        history=(*lora.history, ("names", base.naming)),
        as_loaded=lora.as_loaded or ((lora.naming, dict(lora.metadata)) if lora.naming == "kohya" else None),
    )


class _Found:
    """Base name -> how to build its update."""

    def __init__(self) -> None:
        self.builds: dict[str, _Build] = {}
        self._from: dict[str, str] = {}
        self.problems = Problems("an adapter's weights cannot be told apart in this base")

    def add(self, own: str, name: str, build: _Build) -> None:
        if own in self.builds:
            self.problems.add(f"weights {self._from[own]} and {name} are both {own}")
        self.builds[own], self._from[own] = build, name


def _extras_fit(lora: LoadedLora, base: BaseModel) -> bool:
    return all(name in base.shapes for kind, values in lora.extras.items() if kind != "alora" for name in values)


def _at(lora: LoadedLora, name: str, place: Place, base: BaseModel) -> LoraDelta:
    """The update of one of the base's weights out of that of the adapter's weight ``name``."""
    return delta_at(lora.adapters[name], place, base.shape_of(place.weight))


def _holder(base: BaseModel, block: str, part: str) -> str | None:
    """The base's parameter that holds that part of all experts of a block."""
    return base.own_name(f"{block}.{'down_proj' if part == 'down' else 'gate_up_proj'}")


def _held(lora: LoadedLora, base: BaseModel, holder: str, members: Mapping[tuple[str, int], str]) -> LoraDelta:
    """The updates of single experts as one of the parameter that holds them."""
    experts = base.experts_in(holder) or 1 + max(number for _, number in members)
    parts: dict[str, dict[int, LoraDelta]] = {}
    for (part, number), name in members.items():
        parts.setdefault(part, {})[number] = lora.adapters[name]
    whole = {part: together(deltas, experts) for part, deltas in parts.items()}
    return whole["down"] if "down" in whole else beside(whole.get("gate"), whole.get("up"))


def _singles(base: BaseModel, block: str, parameter: str) -> list[tuple[str, int, str]]:
    """(part, number, base name) of the single experts that a parameter of all is in this base; none without such."""
    found = []
    for part in ("down",) if parameter == "down_proj" else ("gate", "up"):
        for layer in LAYERS[part]:
            number = 0
            while own := base.own_name(f"{block}.{number}.{layer}.weight"):
                found.append((part, number, own))
                number += 1
    return found


def _taken(lora: LoadedLora, name: str, part: str, number: int) -> LoraDelta:
    """The update of one single expert out of that of the parameter ``name``."""
    delta = lora.adapters[name]
    return one_of(delta if part == "down" else halves(delta)[part == "up"], number)
