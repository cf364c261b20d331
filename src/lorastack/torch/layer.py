"""LiveLayer: the updates of all attached adapters at one module, concatenated, added to its output by a hook.

``output + ((x @ A_all^T) * s) @ B_all^T``: two products however many adapters there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorastack.torch.factors import Factors, RowMixture
from lorastack.torch.places import Place

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class LiveLayer(Factors):
    """The factors at one place; ``hook`` adds their sum to the module's output."""

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        super().__init__()
        self.place = place
        self.dtype = dtype
        self.kind = place.kind
        self.bias: torch.Tensor | None = None
        self.mixture: RowMixture | None = None
        self.embed_scale = getattr(place.module, "embed_scale", None) if place.kind == "embedding" else None
        self._handle: Any = None

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
            return self.mixture.add_linear(self, x, output, self.may_add_in_place(output))
        if self.in_order:
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
        if self.in_order and self.mixture is None:
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
