"""LoKr updates of two full factors, which no low rank holds, cut to the nearest of one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType

from lorastack.core.adapter import LoadedLora
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import ArgumentError, Failures, shown
from lorastack.formats.peft import NOTES_KEY


def cut_products(lora: LoadedLora, rank: int) -> LoadedLora:
    """The adapter with every Kronecker product of two full factors as the nearest plain update of that rank.

    Two small decompositions each; `lorastack.inspect` says the error of every one, relative and exact.

    Raises
    ------
    ArgumentError
        When the rank is no whole number above 0.
    """
    if type(rank) is not int or rank < 1:
        raise ArgumentError(f"rank is a whole number above 0, got {shown(rank)}")
    products = lora.extras.get("lokr")
    if not products:
        return lora
    failures = Failures(f"{lora.name} cannot be cut to rank {rank}")
    found = {name: failures.get(partial(product.best, rank)) for name, product in products.items()}
    failures.raise_any()
    cut = {name: one for name, one in found.items() if one is not None}
    said = [f"{name} is cut to rank {delta.rank}, relative error {error:.3g}" for name, (delta, error) in cut.items()]
    names = dict.fromkeys([*lora.adapters, *cut])
    return replace(
        lora,
        adapters=LazyDeltas(names, lambda name, _: cut[name][0] if name in cut else lora.adapters[name]),
        extras=MappingProxyType({kind: values for kind, values in lora.extras.items() if kind != "lokr"}),
        metadata=MappingProxyType({**lora.metadata, NOTES_KEY: (*lora.metadata.get(NOTES_KEY, ()), *said)}),
        history=(*lora.history, ("lokr_rank", rank)),
    )
