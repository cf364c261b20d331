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
from lorastack.torch.pool import PAGE, Pool
from lorastack.torch.prepared import Slot
from lorastack.torch.rows import product_type
from lorastack.torch.tensors import as_looked_up
from lorastack.torch.tiles import Layout
from lorastack.torch.ways import Way
from lorastack.torch.ways.dense import DENSE
from lorastack.torch.ways.each import EACH
from lorastack.torch.ways.pages import PAGES, there_is_triton

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: Up to so many ranks all rows share two products; beyond, on a CPU, each has its own.
DENSE_RANKS = 2 * PAGE


class LiveLayer(Factors):
    """The factors at one place; ``hook`` adds their sum to the module's output."""

    def __init__(self, place: Place, dtype: torch.dtype, passes: Passes) -> None:
        super().__init__(lambda *given: _grown(*given))
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
        #: By row: the factors in pages, made when rows are first asked for, where adapters lie, and how it is computed;
        #: without pages and a way, adapter after adapter.
        self.pool: Any = None
        self.layout: Any = None
        self.way: Way | None = None

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

    def _by_row(self, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        way = self.way
        if way in (EACH, PAGES) and (
            torch.compiler.is_compiling() or (torch.is_grad_enabled() and output.requires_grad)
        ):
            way = None if self.in_order else DENSE
        if way is None:
            return self._one_by_one(x, output, F.linear, F.linear, running)
        added = way.add(self, running, x, output, in_place)
        for slot in self.slots if self.biased else ():
            if slot.bias is not None:
                scale = running.mixture.spread(self.layout, slot.entry, running, added, True)
                added = added + torch.where(scale != 0, scale * slot.bias, 0).to(added.dtype)
        return added

    def lay_out(self, known: dict[Any, Layout]) -> None:
        """Put what came or went since into the pages, and see which of the known layouts this is, or add one."""
        by_page = self.kind == "linear" and not self.gated and all(slot.dora is None for slot in self.slots)
        device = self.a.device
        dtype = product_type(self.dtype, device) if by_page else self.dtype
        if by_page:
            self.pool = self.pool or Pool(self.a.shape[1], self.b.shape[0], dtype, device)
            self.pool.keep(self.slots, self.a, self.b)
            firsts = [self.pool.first_page(slot.key) * PAGE for slot in self.slots]
            total = self.pool.used * PAGE
        else:
            self.pool = None
            firsts = [sum(slot.rank for slot in self.slots[:n]) for n in range(len(self.slots))]
            total = self.rank
        spans = {slot.entry: (at, slot.rank, slot.scaling) for slot, at in zip(self.slots, firsts, strict=True)}
        key = (tuple(spans.items()), total, dtype, device)
        if key not in known:
            known[key] = Layout(spans, total, dtype, device)
        self.layout = known[key]
        self.way = self._way(total) if by_page else None

    def _way(self, total: int) -> Way | None:
        if self.a.device.type == "cpu" and (total > DENSE_RANKS or self.in_order):
            return EACH
        if self.a.device.type == "cuda" and there_is_triton() and self.dtype.itemsize <= 4:
            return PAGES
        return None if self.in_order else DENSE

    def _acting(self, running: Pass, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Adapter after adapter, each where it acts."""
        h = F.linear(x, self.a)
        h = h * self.s if running.mixture is None else running.mixture.masked(self.layout, running, h, x, self.name)
        result, start = output.to(h.dtype), 0
        for slot in self.slots:
            stop = start + slot.rank
            y = F.linear(h[..., start:stop], self.b[:, start:stop])
            if slot.bias is not None:
                y = y + self._multiplier(slot, start, running, y) * slot.bias
            if slot.tokens is not None:
                y = torch.where(mask(running.acting[slot.entry], y), y, 0)
            result = result + y
            start = stop
        return result.to(output.dtype)

    def _multiplier(self, slot: Slot, start: int, running: Pass | None, like: torch.Tensor) -> torch.Tensor:
        """Scale times scaling of an adapter: the stack's, or each row's own."""
        if running is None or running.mixture is None:
            return self.s[start]
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
        return as_looked_up(self.place.module, F.linear(h, b))

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
        if self.in_order:
            return self._one_by_one(x, output, shrink, conv, running)
        h = shrink(x, self.a)
        channels = 1 if h.dim() == len(module.kernel_size) + 2 else 0
        last = h.movedim(channels, -1)
        last = last * self.s if running.mixture is None else self._masked(running, last)
        y = conv(last.movedim(-1, channels).contiguous(), self.b)
        like_channels = (-1, *[1] * len(module.kernel_size))
        if running.mixture is not None:
            for slot in self.slots:
                if slot.bias is not None:
                    y = y + self._multiplier(slot, 0, running, y) * slot.bias.view(like_channels)
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
        start = 0
        for slot in self.slots:
            stop = start + slot.rank
            if not by_row and not slot.finite and float(self.s[start]) == 0:
                start = stop
                continue
            y = expand(shrink(x, self.a[start:stop]), self.b[:, start:stop].contiguous())
            scaled = self._multiplier(slot, start, running, result)
            change = slot.dora.change(result, y, slot.scaling, scaled) if slot.dora else scaled * y
            if by_row and slot.bias is not None:
                trailing = [1] * (result.dim() - 2) if self.kind == "conv" else []
                change = change + scaled * slot.bias.view(-1, *trailing)
            result = result + (torch.where(scaled != 0, change, 0) if by_row else change)
            start = stop
        return (result if by_row else self._biased(result)).to(output.dtype)

    @property
    def needs_refresh(self) -> bool:
        """Whether something beside ``s`` follows the scales."""
        return self.bias is not None or self.biased

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


def _grown(buffer: torch.Tensor, axis: int, used: int, room: int) -> torch.Tensor:
    shape = list(buffer.shape)
    shape[axis] = room
    grown = buffer.new_empty(shape)
    grown.narrow(axis, 0, used).copy_(buffer.narrow(axis, 0, used))
    return grown
