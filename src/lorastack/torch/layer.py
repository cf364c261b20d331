"""LiveLayer: the updates of all attached adapters at one module, concatenated, added to its output by a hook.

``output + ((x @ A_all^T) * s) @ B_all^T``: two products however many adapters there are. ``A_all [R, in]``
and ``B_all [out, R]`` grow with room to spare, so that a further adapter is copied in without touching
the others; ``s [R]`` is a view of the handle's one vector of scales, which a scale change rewrites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorastack.torch.places import Place
from lorastack.torch.prepared import Prepared, Slot
from lorastack.torch.rows import Mixture

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class LiveLayer:
    """The factors at one place; ``hook`` adds their sum to the module's output."""

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        self.place = place
        self.dtype = dtype
        self.kind = place.kind
        self.slots: list[Slot] = []
        self.rank = 0
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None
        self.a = torch.empty(0)
        self.b = torch.empty(0)
        self.s = torch.empty(0)
        self.bias: torch.Tensor | None = None
        self.mixture: Mixture | None = None
        self.mixed: Any = None
        self.embed_scale = getattr(place.module, "embed_scale", None) if place.kind == "embedding" else None
        self._handle: Any = None
        self._in_order = False  # adapter after adapter instead of all at once: DoRA, or NaN that was let in

    def add(self, entry: int, part: Prepared) -> None:
        """Put an adapter's factors behind the others'."""
        self._append(part.a, part.b, part.rank)
        self.slots.append(Slot(entry, part.rank, part.scaling, part.dora, part.bias, part.finite))
        self._in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)

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
        self._in_order = any(slot.dora is not None or not slot.finite for slot in self.slots)

    def _narrow(self) -> None:
        assert self._a is not None
        assert self._b is not None
        self.a, self.b = self._a[: self.rank], self._b[:, : self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for t in (self._a, self._b) if t is not None)

    def attach(self) -> None:
        """Register the hook that fits the module's kind."""
        hooks = {"linear": self._linear, "embedding": self._embedding, "conv": self._conv}
        self._handle = self.place.module.register_forward_hook(hooks[self.kind], with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _linear(self, module: nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor:
        x = _input(args, kwargs)
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.mixture is not None:
            return self.mixture.add_linear(self, x, output)
        if self._in_order:
            return self._one_by_one(x, output, lambda t, a: F.linear(t, a), lambda t, b: F.linear(t, b))
        h = F.linear(x, self.a) * self.s
        if h.dtype != output.dtype:
            return (output.to(h.dtype) + self._biased(F.linear(h, self.b))).to(output.dtype)
        flat = output.reshape(-1, output.shape[-1])
        h = h.reshape(-1, h.shape[-1])
        if self.may_add_in_place(output):
            flat.addmm_(h, self.b.t())
            return self._biased(output)
        return self._biased(torch.addmm(flat, h, self.b.t()).view(output.shape))

    def may_add_in_place(self, output: torch.Tensor) -> bool:
        """Whether the output is a fresh tensor that nobody else has seen, which saves a copy of it."""
        module = self.place.module
        fresh = type(module) is nn.Linear and output.is_contiguous() and not output.requires_grad
        return fresh and len(module._forward_hooks) == 1

    def _embedding(self, module: nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor:
        # F.embedding wants rows by token; A is kept [R, vocabulary], so the columns are picked instead.
        ids = _input(args, kwargs)
        h = self.a[:, ids.reshape(-1)].t()
        h = h * self.s if self.mixture is None else self.mixture.scale(self, h)
        y = F.linear(h, self.b).view(*ids.shape, -1)
        if self.embed_scale is not None:
            y = y * self.embed_scale.to(y.dtype)
        return (output.to(y.dtype) + y).to(output.dtype)

    def _conv(self, module: Any, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor:
        x = _input(args, kwargs).to(self.dtype)

        def shrink(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return module._conv_forward(t, a, None)  # the module's own stride, padding and dilation

        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
        if self._in_order and self.mixture is None:
            return self._one_by_one(x, output, shrink, conv)
        h = shrink(x, self.a)
        channels = 1 if h.dim() == len(module.kernel_size) + 2 else 0
        last = h.movedim(channels, -1)
        last = last * self.s if self.mixture is None else self.mixture.scale(self, last)
        y = conv(last.movedim(-1, channels).contiguous(), self.b)
        if self.bias is not None:
            y = y + self.bias.view(-1, *[1] * len(module.kernel_size))
        return (output.to(y.dtype) + y).to(output.dtype)

    def _one_by_one(self, x: torch.Tensor, output: torch.Tensor, shrink: Any, expand: Any) -> torch.Tensor:
        """Adapter after adapter, in the order pushed, as PEFT does: DoRA rescales what came before it."""
        result = output.to(self.dtype)
        start = 0
        for slot in self.slots:
            stop = start + slot.rank
            if not slot.finite and float(self.s[start]) == 0:
                start = stop
                continue
            y = expand(shrink(x, self.a[start:stop]), self.b[:, start:stop].contiguous())
            scaled = self.s[start]
            result = result + (slot.dora.change(result, y, slot.scaling, scaled) if slot.dora else scaled * y)
            start = stop
        return self._biased(result).to(output.dtype)

    @property
    def needs_refresh(self) -> bool:
        """Whether something beside ``s`` follows the scales."""
        return self.bias is not None or any(slot.bias is not None for slot in self.slots)

    def refresh(self) -> None:
        """The sum of the adapters' lora_B biases at their present scales."""
        self.bias, start = None, 0
        for slot in self.slots:
            if slot.bias is not None:
                part = self.s[start] * slot.bias
                self.bias = part if self.bias is None else self.bias + part
            start += slot.rank

    def _biased(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias


def _input(args: Args, kwargs: Kwargs) -> torch.Tensor:
    """What the module was called with: its first argument, by place or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def _grown(buffer: torch.Tensor, axis: int, used: int, room: int) -> torch.Tensor:
    shape = list(buffer.shape)
    shape[axis] = room
    grown = buffer.new_empty(shape)
    grown.narrow(axis, 0, used).copy_(buffer.narrow(axis, 0, used))
    return grown
