"""Factors: those of all attached adapters at one place, and which ranks are whose.

``s [R]``, every rank's multiplier, is a view of the handle's one vector of scales, which a scale change rewrites.
"""

from __future__ import annotations

from typing import Any

import torch

from lorastack.torch.pool import Pool, Span
from lorastack.torch.prepared import Prepared, Slot


class Factors:
    """``a [R, in, ...]``, ``b [R, out, ...]`` and ``s [R]`` of all adapters, and which ranks are whose (``slots``)."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.pool = Pool()
        self.a, self.b = self.pool.a, self.pool.b
        self.s = torch.empty(0)
        self.in_order = False  # adapter after adapter instead of all at once: DoRA, or NaN that was let in
        self.gated = False  # an adapter acts from its invocation tokens on only
        self.biased = False  # an adapter has a bias of lora_B

    @property
    def rank(self) -> int:
        """Ranks of ``a``, ``b`` and ``s``: those between adapters, which are nobody's, have the multiplier 0."""
        return len(self.a)

    def add(self, entry: int, part: Prepared, coming: int = 0) -> None:
        """Hold an adapter's factors; ``coming`` ranks come at once, these included."""
        first = self.pool.put(part.a, part.b.transpose(0, 1), self._spans(), max(coming, part.rank))
        own = (part.rank, part.scaling, part.dora, part.bias, part.finite, part.tokens)
        self.slots.append(Slot(entry, first, *own))
        self._note_slots()

    def remove(self, entry: int) -> None:
        """Let go of an adapter's factors; the entries behind it move up by one."""
        gone = [slot for slot in self.slots if slot.entry == entry]
        self.slots = [
            slot._replace(entry=slot.entry - (slot.entry > entry)) for slot in self.slots if slot.entry != entry
        ]
        for slot in gone if self.slots else ():
            self.pool.free((slot.first, slot.rank), self._spans())
        self._note_slots()

    def _spans(self) -> list[Span]:
        return [(slot.first, slot.rank) for slot in self.slots]

    def _note_slots(self) -> None:
        self.a, self.b = self.pool.a, self.pool.b
        self.in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)
        self.gated = any(slot.tokens is not None for slot in self.slots)
        self.biased = any(slot.bias is not None for slot in self.slots)

    def state(self) -> Any:
        """What `restore` brings back."""
        return {**self.__dict__, "slots": list(self.slots)}, self.pool.state()

    def restore(self, state: Any) -> None:
        """Be as `state` found it."""
        own, pool = state
        self.__dict__.clear()
        self.__dict__.update(own, slots=list(own["slots"]))
        self.pool.restore(pool, self._spans())
        self._note_slots()

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return self.pool.nbytes
