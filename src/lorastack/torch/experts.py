"""LiveParameter: updates of a bare parameter - experts in one 3-D tensor, or any weight that a module's own code uses.

There is no module whose output could be added to. While a stack is attached, the module finds a `LoraWeight` under the
parameter's name (in its ``__dict__``, which shadows the parameter and leaves the parameter itself alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lorastack.torch.places import Place
from lorastack.torch.prepared import Prepared, Slot
from lorastack.torch.weight import LoraWeight

#: Products by groups ask for rows of 16 bytes.
_PAD = 8


class LiveParameter:
    """The updates at one bare parameter; while attached, the module finds a `LoraWeight` in its place."""

    kind = "parameter"

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        self.place = place
        self.dtype = dtype
        self.slots: list[Slot] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rank = 0
        self.s = torch.empty(0)
        self.bias = None
        self.reached = False
        self._shown = self.time_first = False

    def add(self, entry: int, part: Prepared) -> None:
        """Put an adapter's factors behind the others'."""
        self._parts.append((part.a, part.b))
        self.rank += part.rank
        self.slots.append(Slot(entry, part.rank, part.scaling, None, None, part.finite))

    def remove(self, entry: int) -> None:
        kept = [n for n, slot in enumerate(self.slots) if slot.entry != entry]
        self._parts = [self._parts[n] for n in kept]
        self.slots = [self.slots[n]._replace(entry=self.slots[n].entry - (self.slots[n].entry > entry)) for n in kept]
        self.rank = sum(slot.rank for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for part in self._parts for t in part)

    def attach(self) -> None:
        self._shown = True
        self.refresh()

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
        start, folded = 0, []
        for (_, b), slot in zip(self._parts, self.slots, strict=True):
            folded.append(b * self.s[start : start + slot.rank])
            start += slot.rank
        a, b = torch.cat([part[0] for part in self._parts], -2), torch.cat(folded, -1)
        if pad := -self.rank % _PAD:
            a, b = F.pad(a, (0, 0, 0, pad)), F.pad(b, (0, pad))
        turned = self.place.turned(b.shape[-2], a.shape[-1])
        left, right = (a.transpose(-1, -2), b.transpose(-1, -2)) if turned else (b, a)
        self.place.module.__dict__[self.place.parameter] = LoraWeight.of(weight, left, right, self)

    def detach(self) -> None:
        self._shown = False
        self.place.module.__dict__.pop(self.place.parameter, None)
