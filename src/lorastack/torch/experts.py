"""LiveParameter: updates of a bare parameter - experts in one 3-D tensor, or any weight that a module's own code uses.

There is no module whose output could be added to. While a stack is attached, the module finds a `LoraWeight` under the
parameter's name (in its ``__dict__``, which shadows the parameter and leaves the parameter itself alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lorastack.torch.experts_by_row import ExpertsByRow, Update, refusal
from lorastack.torch.places import Place
from lorastack.torch.prepared import Prepared, Slot
from lorastack.torch.tiles import Layout
from lorastack.torch.weight import LoraWeight

#: Products by groups ask for rows of 16 bytes.
_PAD = 8


class LiveParameter:
    """The updates at one bare parameter; while attached, the module finds a `LoraWeight` in its place."""

    kind = "parameter"

    def __init__(self, place: Place, dtype: torch.dtype, number: int) -> None:
        self.place = place
        self.number = number
        self.dtype = dtype
        self.slots: list[Slot] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rank = 0
        self.s = torch.empty(0)
        self.bias = None
        self.reached = False
        self._shown = self.time_first = False

    def add(self, entry: int, part: Prepared, coming: int = 0) -> None:
        """Put an adapter's factors behind the others'."""
        self._parts.append((part.a, part.b))
        self.slots.append(Slot(entry, self.rank, part.rank, part.scaling, None, None, part.finite))
        self.rank += part.rank

    def remove(self, entry: int) -> None:
        kept = [n for n, slot in enumerate(self.slots) if slot.entry != entry]
        self._parts = [self._parts[n] for n in kept]
        slots, self.slots, self.rank = [self.slots[n] for n in kept], [], 0
        for slot in slots:
            self.slots.append(slot._replace(entry=slot.entry - (slot.entry > entry), first=self.rank))
            self.rank += slot.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for part in self._parts for t in part)

    def attach(self) -> None:
        self._shown = True
        if self.without_rows() is None:
            self._by_row().updates.setdefault(self.place.parameter, None)
        self.refresh()

    def without_rows(self) -> str | None:
        """Why the rows of its tokens cannot be told apart; None where they can."""
        if any(not slot.finite for slot in self.slots):
            return f"it has NaN or Inf in {self.place.name}, which rows cannot be kept apart from"
        return refusal(self.place.module, self.place.parameter)

    def _by_row(self) -> ExpertsByRow:
        there = self.place.module.__dict__.get("forward")
        return there if isinstance(there, ExpertsByRow) else ExpertsByRow(self.place.module, self.number)

    def lay_out(self, known: dict[Any, Layout]) -> None:
        """Have the module compute with these adapters by row, and see which of the known layouts this is."""
        left, right = self._factors([part[1] for part in self._parts])
        spans = {slot.entry: (slot.first, slot.rank, slot.scaling) for slot in self.slots}
        total, device = left.shape[-1], left.device
        key = (tuple(spans.items()), total, self.dtype, self.dtype, device)
        if key not in known:
            known[key] = Layout(spans, total, self.dtype, self.dtype, device)
        module: Any = self.place.module
        a, b = (left, right) if module.is_transposed else (right.mT, left.mT)
        self._by_row().updates[self.place.parameter] = Update(a, b, known[key], self)

    def _factors(self, bs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """``left [..., rows, R]`` and ``right [..., R, columns]`` of all adapters, as the model keeps the parameter."""
        a, b = torch.cat([part[0] for part in self._parts], -2), torch.cat(bs, -1)
        if pad := -self.rank % _PAD:
            a, b = F.pad(a, (0, 0, 0, pad)), F.pad(b, (0, pad))
        turned = self.place.turned(b.shape[-2], a.shape[-1])
        return (a.transpose(-1, -2), b.transpose(-1, -2)) if turned else (b, a)

    attach_again = attach

    @property
    def attached(self) -> bool:
        """Whether the module is shown the updates."""
        return self._shown

    def state(self) -> dict[str, Any]:
        """What `restore` brings back."""
        return {**self.__dict__, "slots": list(self.slots), "_parts": list(self._parts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as `state` found it."""
        self.__dict__.clear()
        self.__dict__.update(state)

    @property
    def needs_refresh(self) -> bool:
        """Always: the scales are folded into what the module is shown."""
        return True

    def refresh(self) -> None:
        """Show the module the updates at their present scales."""
        if not self._shown or not self._parts:
            return
        weight = self.place.module._parameters[self.place.parameter]
        assert weight is not None
        folded = [
            b * self.s[slot.first : slot.first + slot.rank]
            for (_, b), slot in zip(self._parts, self.slots, strict=True)
        ]
        left, right = self._factors(folded)
        self.place.module.__dict__[self.place.parameter] = LoraWeight.of(weight, left, right, self)

    def detach(self) -> None:
        self._shown = False
        self.place.module.__dict__.pop(self.place.parameter, None)
        there = self.place.module.__dict__.get("forward")
        if isinstance(there, ExpertsByRow):
            there.updates.pop(self.place.parameter, None)
            if not there.updates:
                there.take_off()
