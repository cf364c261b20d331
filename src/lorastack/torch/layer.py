"""LiveLayer: the updates of all attached adapters at one module, concatenated, added to its output by a hook.

``output + ((x @ A_all^T) * s) @ B_all^T``: two products however many adapters there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorastack.torch.activation import mask
from lorastack.torch.factors import Factors
from lorastack.torch.passes import CURRENT, Pass, Passes, eager, not_pickled
from lorastack.torch.places import Place
from lorastack.torch.prepared import Slot
from lorastack.torch.rows import product_type
from lorastack.torch.tensors import as_looked_up
from lorastack.torch.tiles import Layout
from lorastack.torch.ways import Way, choice

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class LiveLayer(Factors):
    """The factors at one place; ``hook`` adds their sum to the module's output."""

    def __init__(self, place: Place, dtype: torch.dtype, passes: Passes) -> None:
        super().__init__()
        self.place = place
        self.name = place.name
        self.dtype = dtype
        self.kind = place.kind
        self.passes, self.number = passes, passes.number
        #: Whether a pass got here.
        self.reached = False
        self.bias: torch.Tensor | None = None
        #: Whether the batch is the second axis here.
        self.time_first = False
        self._handle: Any = None
        #: By row: where adapters lie, and how it is computed; without a way, adapter after adapter.
        self.layout: Any = None
        self.way: Way | None = None
        self.followers: list[LiveLayer] = []

    def __deepcopy__(self, memo: Any) -> LiveLayer:
        return self  # a copy of an attached model has what the model has, until it is detached

    def __reduce__(self) -> Any:
        raise not_pickled()

    def attach(self) -> None:
        """Register the hook."""
        if self._handle is None:
            self._handle = self.place.module.register_forward_hook(self._hook, with_kwargs=True)

    def attach_again(self) -> None:
        """Register the hook after a change was undone, which took it off."""
        self._handle = None
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether the module has the hook."""
        return self._handle is not None

    def detach(self) -> None:
        self._handle = None
        sweep(self.place.module, self)

    def _hook(self, module: nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor:
        running = CURRENT.running
        if running is None or running.number != self.number:
            return _alone()(self, module, args, kwargs, output)
        return self._add(running, module, args, kwargs, output)

    def _add(self, running: Pass, module: Any, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor:
        self.reached = True
        x = _input(args, kwargs)
        if self.a.device != x.device and self.a.numel():  # accelerate moves the module's own input, not what we see
            x = x.to(self.a.device)
        if self.kind == "linear":
            return self._linear(running, x, output)
        if self.kind == "embedding":
            return self._embedding(running, x, output)
        return self._conv(running, module, x, output)

    def _linear(self, running: Pass, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.gated:
            return self._acting(running, x, output)
        if running.mixture is not None:
            if self.time_first:
                turned = x.transpose(0, 1), output.transpose(0, 1)
                return self._by_row(running, *turned, False).transpose(0, 1).contiguous()
            return self._by_row(running, x, output, self.may_add_in_place(output))
        if self.in_order:
            return self._one_by_one(x, output, F.linear, torch.matmul)
        h = F.linear(x, self.a) * self.s
        if h.dtype != output.dtype:
            return (output.to(h.dtype) + self._biased(h @ self.b)).to(output.dtype)
        flat = output.reshape(-1, output.shape[-1])
        h = h.reshape(-1, h.shape[-1])
        if self.may_add_in_place(output):
            flat.addmm_(h, self.b)
            return self._biased(output)
        return self._biased(torch.addmm(flat, h, self.b).view(output.shape))

    def _by_row(self, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        way = choice.of_pass(self, running, x, output)
        if way is None:
            return self._one_by_one(x, output, F.linear, torch.matmul, running)
        added = way.add(self, running, x, output, in_place)
        for slot in self.slots if self.biased else ():
            if slot.bias is not None:
                scale = running.mixture.spread(self.layout, slot.entry, running, added, True)
                added = added + torch.where(scale != 0, scale * slot.bias, 0).to(added.dtype)
        return added

    def lay_out(self, known: dict[Any, Layout]) -> None:
        """See which of the known layouts this is, or add one."""
        mixed = self.kind == "linear" and not self.gated and all(slot.dora is None for slot in self.slots)
        device = self.a.device
        dtype = product_type(self.dtype, device) if mixed else self.dtype
        spans = {slot.entry: (slot.first, slot.rank, slot.scaling) for slot in self.slots}
        key = (tuple(spans.items()), self.rank, dtype, self.dtype, device)
        if key not in known:
            known[key] = Layout(spans, self.rank, dtype, self.dtype, device)
        self.layout = known[key]
        self.way = choice.own(self) if mixed else None
        self.followers = []

    def _acting(self, running: Pass, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Adapter after adapter, each where it acts."""
        h = F.linear(x, self.a)
        h = h * self.s if running.mixture is None else running.mixture.masked(self.layout, running, h, x, self.name)
        result = output.to(h.dtype)
        for slot in self.slots:
            own = slice(slot.first, slot.first + slot.rank)
            y = h[..., own] @ self.b[own]
            if slot.bias is not None:
                y = y + self._multiplier(slot, running, y) * slot.bias
            if slot.tokens is not None:
                y = torch.where(mask(running.acting[slot.entry], y), y, 0)
            result = result + y
        return result.to(output.dtype)

    def _multiplier(self, slot: Slot, running: Pass | None, like: torch.Tensor) -> torch.Tensor:
        """Scale times scaling of an adapter: the stack's, or each row's own."""
        if running is None or running.mixture is None:
            return self.s[slot.first]
        made: torch.Tensor = running.mixture.spread(self.layout, slot.entry, running, like, self.kind != "conv")
        return made

    def may_add_in_place(self, output: torch.Tensor) -> bool:
        """Whether the output is a fresh tensor that nobody else has seen, which saves a copy of it."""
        module = self.place.module
        fresh = type(module) is nn.Linear and output.is_contiguous() and not output.requires_grad
        # Hooks on all modules, as profilers set them, see outputs and may keep them.
        return fresh and len(module._forward_hooks) == 1 and not _hooks_on_all()

    def _embedding(self, running: Pass, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # F.embedding wants rows by token; A is kept [R, vocabulary], so the columns are picked instead.
        if running.mixture is not None:
            if self.time_first:
                ids, output = ids.transpose(0, 1), output.transpose(0, 1)
            if running.is_shared(ids):  # positions, looked up once: the rows differ in what comes of them
                ids, output = ids.expand(running.rows, ids.shape[-1]), output.expand(running.rows, *output.shape[-2:])
        if self.in_order:
            added = self._one_by_one(ids, output, self._rows_of, self._widened, running)
        else:
            h = self._rows_of(ids, self.a)
            h = h * self.s if running.mixture is None else self._masked(running, h)
            y = self._widened(h, self.b)
            added = (output.to(y.dtype) + y).to(output.dtype)
        return added.transpose(0, 1).contiguous() if running.mixture is not None and self.time_first else added

    def _masked(self, running: Pass, h: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = running.mixture.masked(self.layout, running, h, h, self.name)
        return made

    @staticmethod
    def _rows_of(ids: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return a[:, ids.reshape(-1)].t().reshape(*ids.shape, -1)

    def _widened(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return as_looked_up(self.place.module, h @ b)

    def _conv(self, running: Pass, module: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)

        def shrink(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            if module.groups == 1:
                return module._conv_forward(t, a, None)  # the module's own stride, padding and dilation
            if module.padding_mode != "zeros":
                t = F.pad(t, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = module.padding if module.padding_mode == "zeros" else 0
            return conv(t, a, None, module.stride, padding, module.dilation)

        conv: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]

        def expand(h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = conv(h, b.transpose(0, 1))
            return made

        if self.in_order:
            return self._one_by_one(x, output, shrink, expand, running)
        h = shrink(x, self.a)
        channels = 1 if h.dim() == len(module.kernel_size) + 2 else 0
        last = h.movedim(channels, -1)
        last = last * self.s if running.mixture is None else self._masked(running, last)
        y = expand(last.movedim(-1, channels).contiguous(), self.b)
        like_channels = (-1, *[1] * len(module.kernel_size))
        if running.mixture is not None:
            for slot in self.slots:
                if slot.bias is not None:
                    y = y + self._multiplier(slot, running, y) * slot.bias.view(like_channels)
        elif self.bias is not None:
            y = y + self.bias.view(like_channels)
        return (output.to(y.dtype) + y).to(output.dtype)

    def _one_by_one(
        self, x: torch.Tensor, output: torch.Tensor, shrink: Any, expand: Any, running: Pass | None = None
    ) -> torch.Tensor:
        """Adapter after adapter, in the order pushed, as PEFT does: DoRA rescales what came before it.

        By row the multipliers are a column, and a row that has none of an adapter is left as it is.
        """
        result = output.to(self.dtype)
        by_row = running is not None and running.mixture is not None
        for slot in self.slots:
            own = slice(slot.first, slot.first + slot.rank)
            if not by_row and not slot.finite and float(self.s[slot.first]) == 0:
                continue
            y = expand(shrink(x, self.a[own]), self.b[own])
            scaled = self._multiplier(slot, running, result)
            change = slot.dora.change(result, y, slot.scaling, scaled) if slot.dora else scaled * y
            if by_row and slot.bias is not None:
                trailing = [1] * (result.dim() - 2) if self.kind == "conv" else []
                change = change + scaled * slot.bias.view(-1, *trailing)
            result = result + (torch.where(scaled != 0, change, 0) if by_row else change)
        return (result if by_row else self._biased(result)).to(output.dtype)

    @property
    def needs_refresh(self) -> bool:
        """Whether something beside ``s`` follows the scales."""
        return self.bias is not None or self.biased

    def refresh(self) -> None:
        """The sum of the adapters' lora_B biases at their present scales."""
        self.bias = None
        for slot in self.slots:
            if slot.bias is not None:
                part = self.s[slot.first] * slot.bias
                self.bias = part if self.bias is None else self.bias + part

    def _biased(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias


def _pass_of_its_own(
    layer: LiveLayer, module: nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor
) -> torch.Tensor:
    """The module was called by itself."""
    running = layer.passes.enter(layer, args, kwargs)
    assert running is not None
    try:
        return layer._add(running, module, args, kwargs, output)
    finally:
        layer.passes.leave(layer)


_kept: list[Any] = []


def _alone() -> Any:
    """`_pass_of_its_own`, which compiled code leaves alone; made once, since that takes as long as a hook."""
    if not _kept:
        _kept.append(eager(_pass_of_its_own))
    return _kept[0]


def sweep(module: nn.Module, owner: Any) -> None:
    """Take every hook of ``owner`` off a module, also one that an interrupt left without its handle."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__self__", None) is owner:
            for hooks in (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                hooks.pop(key, None)


def _hooks_on_all() -> bool:
    return bool(torch.nn.modules.module._global_forward_hooks)


def _input(args: Args, kwargs: Kwargs) -> torch.Tensor:
    """What the module was called with: its first argument, by place or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))
