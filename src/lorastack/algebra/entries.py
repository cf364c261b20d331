"""Entries: the adapters of both lists of a stack by weight name, and the terms they have at each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorastack.base import BaseModel
from lorastack.base.fit import misfits
from lorastack.base.names import convert_names, lora_of_adapter
from lorastack.base.settle import settle
from lorastack.base.together import check_together
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.packed import PackedWeight
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, NamingError, Problems, ShapeError


class Entry(NamedTuple):
    """One adapter of the stack."""

    name: str
    lora: LoadedLora
    scale: float


def entries_of(stack: LoraStack, base: BaseModel | None, verb: str, allow_mixed_bases: bool = False) -> list[Entry]:
    """Both lists; the second, known by (target module, layer) only, in the weight names of ``base``.

    Raises
    ------
    ArgumentError
        When there is nothing to ``verb``, or the second list has no base.
    NamingError
        When the adapters are hardly for one base: where one is given, each has to fit that instead.
    """
    if stack.is_empty():
        raise ArgumentError(f"the stack is empty, so there is nothing to {verb}; push an adapter first")
    entries = [Entry(name, *entry) for name, entry in zip(stack.names, stack.entries, strict=True)]
    if stack.adapters and base is None:
        raise ArgumentError(
            f"{len(stack.adapters)} adapters are known by (target module, layer) only; give {verb}() the base, "
            "whose weight names they get"
        )
    if base is None and not allow_mixed_bases:
        check_together([(one.name, one.lora) for one in entries])
    for n, adapter in enumerate(stack.adapters, len(stack)):
        assert base is not None
        name = f"adapter{n}"
        entries.append(Entry(name, lora_of_adapter(adapter, base, stack.naming, name), 1.0))
    # Under one name for each weight, whatever save an adapter is from.
    return entries if base is None else [one._replace(lora=settle(one.lora, base)) for one in entries]


def check_fit(entries: Sequence[Entry], base: BaseModel) -> None:
    """NamingError that lists everything that has no place in the base."""
    problems = Problems(f"the stack does not fit base {base.name}")
    for one in entries:
        for line in misfits(one.lora, base):
            problems.add(f"{one.name}: {line}")
    problems.raise_any(NamingError)


def fitted(entries: Sequence[Entry], base: BaseModel) -> list[Entry]:
    """The adapters under the base's names; NamingError lists all that does not fit."""
    check_fit(entries, base)
    return [
        one
        if one.lora.naming in (base.naming, "own")
        else one._replace(lora=convert_names(one.lora, base, base.naming))
        for one in entries
    ]


def weights_of(entries: Sequence[Entry], done: str) -> Mapping[str, Mapping[int, LoraDelta]]:
    """Weight name -> number of the entry -> its update.

    Raises
    ------
    ShapeError
        Listing every weight whose updates do not have one shape, and so cannot be ``done``.
    """
    weights: dict[str, dict[int, LoraDelta]] = {}
    for number, entry in enumerate(entries):
        for weight, delta in entry.lora.adapters.items():
            weights.setdefault(weight, {})[number] = delta
    problems = Problems(f"the adapters cannot be {done}, they were made for different bases")
    for weight, at in weights.items():
        try:
            PackedWeight.check([(1.0, delta) for delta in at.values()], [entries[n].name for n in at])
        except ShapeError as error:
            problems.add(f"{weight}: {'; '.join(error.problems)}")
    problems.raise_any(ShapeError)
    return weights
