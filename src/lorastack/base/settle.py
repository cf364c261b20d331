"""Settle: an adapter under the names that a base has for its weights, whatever save the adapter's own are from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from lorastack.base.experts import LAYERS, beside, fused, halves, one_of, single, together
from lorastack.base.extras import extras_at_places
from lorastack.base.foreign import Place, delta_at
from lorastack.base.model import BaseModel, Use
from lorastack.base.roles import use_of
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import NamingError, Problems

_Build = Callable[[], LoraDelta]


def settle(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """The same adapter, each weight under the base's own name; what has none there keeps its name.

    Knows transformers' renamings, the prefix of a backbone saved by itself, experts one by one or in one parameter,
    the names of `foreign`, and which way round the base keeps what an adapter has as it is stored. Nothing is read.

    Raises
    ------
    NamingError
        Listing every weight that two of the adapter's are, and those of which nothing tells how they lie.
    """
    if lora.naming != base.naming and not (lora.naming == "kohya" and base.naming == "hf"):
        return lora
    if all(name in base.shapes for name in lora.adapters) and _extras_fit(lora, base):
        return used(lora, base)
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
    settled = replace(
        lora,
        adapters=LazyDeltas(found.builds, lambda _, build: build()),
        extras=extras_at_places(lora, base),
        naming=base.naming,
        history=(*lora.history, ("names", base.naming)),
        as_loaded=lora.as_loaded or ((lora.naming, dict(lora.metadata)) if lora.naming == "kohya" else None),
    )
    return used(settled, base)


def used(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """The adapter with each update of a weight as it is stored made one of how the base computes with it.

    Raises
    ------
    NamingError
        Listing the square experts of which no version of PEFT, and nothing in the base, tells which way round they are.
    """
    stored = {name: delta for name, delta in lora.adapters.items() if delta.kind == "stored"}
    uses = {name: use for name in stored if (use := use_of(base, name))}
    problems = Problems("an adapter's experts cannot be told from their transposes")
    for name, delta in stored.items():
        turned = name in uses and uses[name].turned
        if delta.num_experts and not turned and not lora.metadata.get("peft_version"):
            problems.add(
                f"weight {name} is square, and adapter_config.json has no peft_version: PEFT before 0.19 kept factors "
                "of experts the other way round; write the version it was saved by into the config"
            )
    problems.raise_any(NamingError)
    if not uses:
        return lora
    how = {name: (lambda n=name: lora.adapters[n]) if name not in uses else partial(_as_used, stored[name], uses[name])
           for name in lora.adapters}  # fmt: skip
    return replace(lora, adapters=LazyDeltas(how, lambda _, build: build()))


def _as_used(delta: LoraDelta, use: Use) -> LoraDelta:
    a, b = delta.factors
    if use.kind == "experts" and not delta.num_experts:  # PEFT takes one expert for a matrix
        a, b = (factor.mapped(lambda x: x[None], (1, *factor.shape)) for factor in (a, b))
        delta = LoraDelta(a, b, delta.scaling, "stored")
    return delta.over(use.kind) if use.turned else LoraDelta(a, b, delta.scaling, use.kind)


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
