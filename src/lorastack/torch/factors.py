"""Factors: those of all attached adapters at one place, side by side, with room to grow.

``A_all [R, in]`` and ``B_all [out, R]`` have room to spare, so that a further adapter is copied in without touching
the others; ``s [R]`` is a view of the handle's one vector of scales, which a scale change rewrites.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from lorastack.torch.prepared import Prepared, Slot


class Factors:
    """``a [R, in]``, ``b [out, R]`` and ``s [R]`` of all adapters, and which rows are whose (``slots``)."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.rank = 0
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None
        self.a = torch.empty(0)
        self.b = torch.empty(0)
        self.s = torch.empty(0)
        #: What a mixture by row made of these factors, for as long as it lasts.
        self.mixed: Any = None
        self.in_order = False  # adapter after adapter instead of all at once: DoRA, or NaN that was let in

    def add(self, entry: int, part: Prepared) -> None:
        """Put an adapter's factors behind the others'."""
        self._append(part.a, part.b, part.rank)
        self.slots.append(Slot(entry, part.rank, part.scaling, part.dora, part.bias, part.finite))
        self.in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)

    def _append(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> None:
        total = self.rank + rank
        if self._a is None or self._b is None:
            self._a, self._b = a, b  # the first adapter stays where it is: in its mapped file, when types agree
        else:
            if self._a.shape[0] < total:
                room = max(total, 2 * self.rank) if self.rank > rank else total
                self._a, self._b = _grown(self._a, 0, self.rank, room), _grown(self._b, 1, self.rank, room)
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
        self.in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)

    def _narrow(self) -> None:
        assert self._a is not None
        assert self._b is not None
        self.a, self.b = self._a[: self.rank], self._b[:, : self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for t in (self._a, self._b) if t is not None)


class RowMixture(Protocol):
    """Scales by row, as a layer uses them."""

    def add_linear(self, factors: Factors, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor: ...
    def scale(self, factors: Factors, h: torch.Tensor) -> torch.Tensor: ...


def _grown(buffer: torch.Tensor, axis: int, used: int, room: int) -> torch.Tensor:
    shape = list(buffer.shape)
    shape[axis] = room
    grown = buffer.new_empty(shape)
    grown.narrow(axis, 0, used).copy_(buffer.narrow(axis, 0, used))
    return grown
