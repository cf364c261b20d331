"""Factors: those of all attached adapters at one place, side by side, with room to grow.

``A_all [R, in]`` and ``B_all [out, R]`` have room to spare, so that a further adapter is copied in without touching
the others; ``s [R]`` is a view of the handle's one vector of scales, which a scale change rewrites.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorastack.torch.prepared import Prepared, Slot


class Factors:
    """``a [R, in]``, ``b [out, R]`` and ``s [R]`` of all adapters, and which rows are whose (``slots``).

    ``grow(buffer, axis, used, room)`` gives a buffer with room for more ranks, its used ones copied.
    """

    def __init__(self, grow: Callable[[torch.Tensor, int, int, int], torch.Tensor]) -> None:
        self._grow = grow
        self.slots: list[Slot] = []
        self.rank = 0
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None
        self.a = torch.empty(0)
        self.b = torch.empty(0)
        self.s = torch.empty(0)
        self.in_order = False  # adapter after adapter instead of all at once: DoRA, or NaN that was let in
        self.gated = False  # an adapter acts from its invocation tokens on only

    def add(self, entry: int, part: Prepared) -> None:
        """Put an adapter's factors behind the others'."""
        self._append(part.a, part.b, part.rank)
        self.slots.append(Slot(entry, part.rank, part.scaling, part.dora, part.bias, part.finite, part.tokens))
        self._note_slots()

    def _append(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> None:
        total = self.rank + rank
        if self._a is None or self._b is None:
            self._a, self._b = a, b  # the first adapter stays where it is: in its mapped file, when types agree
        else:
            if self._a.shape[0] < total:
                room = max(total, 2 * self.rank) if self.rank > rank else total
                self._a = self._grow(self._a, 0, self.rank, room)
                self._b = self._grow(self._b, 1, self.rank, room)
            self._a[self.rank : total] = a
            self._b[:, self.rank : total] = b
        self.rank = total
        self._narrow()

    def remove(self, entry: int) -> None:
        """Take an adapter's factors out; the entries behind it move up by one."""
        kept: list[Slot] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for slot in self.slots:
            if slot.entry != entry:
                spans.append((start, start + slot.rank))
                kept.append(slot._replace(entry=slot.entry - (slot.entry > entry)))
            start += slot.rank
        if len(kept) < len(self.slots) and kept and self._a is not None and self._b is not None:
            if spans[-1][1] == sum(slot.rank for slot in kept):  # it was the last: the others stay where they are
                self.rank = spans[-1][1]
            else:
                self._a = torch.cat([self._a[i:j] for i, j in spans])
                self._b = torch.cat([self._b[:, i:j] for i, j in spans], 1)
                self.rank = self._a.shape[0]
            self._narrow()
        self.slots = kept
        self._note_slots()

    def _note_slots(self) -> None:
        self.in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)
        self.gated = any(slot.tokens is not None for slot in self.slots)

    def state(self) -> dict[str, object]:
        """What `restore` brings back: numbers beyond the rank may be written meanwhile, those within it are not."""
        return {**self.__dict__, "slots": list(self.slots)}

    def restore(self, state: dict[str, object]) -> None:
        """Be as `state` found it."""
        self.__dict__.clear()
        self.__dict__.update(state)

    def _narrow(self) -> None:
        assert self._a is not None
        assert self._b is not None
        self.a, self.b = self._a[: self.rank], self._b[:, : self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for t in (self._a, self._b) if t is not None)
