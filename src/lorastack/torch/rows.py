"""Mixtures by row: every row of a batch has its own scales, as a matrix rows x adapters.

Two ways to compute it, chosen for each layer by how much the dense one would waste:

*gathered* - each row's own factors side by side, padded to the widest row, gathered once for each batch
composition with the scales folded in; two batched products. A row meets no factor but its own.

*dense* - ``H = X A_all^T`` for all adapters in use, then ``where(S != 0, H * S, 0)``, so that Inf or NaN
of an adapter that a row does not use cannot reach it. Reads the weights once, whatever the rows want.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from lorastack.errors import ShapeError
from lorastack.torch.factors import Factors
from lorastack.torch.layout import sees_pictures
from lorastack.torch.passes import Pass
from lorastack.torch.plan import rows_of_layer

#: Gathered factors may be this many times the attached ones before rows share them instead.
MAX_GATHERED = 8
#: Dense pays for every adapter in use; gathering wins from about here (benchmarks/rows.py).
DENSE_WASTE = 2


class Gathered(NamedTuple):
    """Each row's own factors: ``a [rows, in, r]``, ``b [rows, r, out]``, scales folded into b."""

    a: torch.Tensor
    b: torch.Tensor
    name: str = ""
    pictures: bool = False


class Dense(NamedTuple):
    """All factors in use, and each row's multipliers ``scales [rows, R]``."""

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    mask: torch.Tensor
    #: Factors with NaN or Inf, which must not meet other rows even times 0: ``(a, b, scales [rows])`` each.
    apart: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()
    #: Each row's sum of lora_B biases, ``[rows, out]``.
    bias: torch.Tensor | None = None
    name: str = ""
    pictures: bool = False


Way = Gathered | Dense


class Mixture:
    """The scales of each row for each adapter, ``table [rows, adapters]``; and how tokens belong to rows.

    Parameters
    ----------
    index
        For packed input: the row of every token, ``[tokens]``. Without it the batch is split evenly, so
        that beams and returned sequences, which repeat rows, follow their row.
    """

    def __init__(self, table: torch.Tensor, index: torch.Tensor | None = None) -> None:
        self.table = table
        self.index = index
        self.rows = table.shape[0]
        self.wanted = [[n for n, scale in enumerate(row) if scale != 0] for row in table.tolist()]
        self.active = {n for row in self.wanted for n in row}
        self._scratch: torch.Tensor | None = None

    def way(self, factors: Factors, linear: bool) -> Way:
        """How the rows are computed at these factors; made once, before a pass."""
        name = getattr(factors, "name", "")
        if linear:
            return self._choose(factors)._replace(name=name, pictures=sees_pictures(name))
        scales = self._scales(factors, factors.slots)
        return Dense(factors.a, factors.b, scales, scales != 0, (), self._biases(factors), name, sees_pictures(name))

    def _biases(self, factors: Factors) -> torch.Tensor | None:
        each = [
            self.table[:, slot.entry, None].to(slot.bias.device) * slot.scaling * slot.bias
            for slot in factors.slots
            if slot.bias is not None
        ]
        return torch.stack(each).sum(0) if each else None

    def with_bias(self, way: Way, y: torch.Tensor) -> torch.Tensor:
        """``y [rows, ..., out]`` with every row's lora_B biases."""
        if not isinstance(way, Dense) or way.bias is None:
            return y
        bias = way.bias.to(y.dtype)[:, None]
        return (y.reshape(self.rows, -1, y.shape[-1]) + bias).view(y.shape)

    def add_linear(
        self, way: Way, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool
    ) -> torch.Tensor:
        """``output`` plus every row's own sum."""
        if isinstance(way, Gathered):
            self._check(way, running, x)
            return self._add_gathered(way, x, output, in_place)
        x = x.to(way.a.dtype)
        y = F.linear(self.scale(way, running, F.linear(x, way.a), x), way.b)
        if way.bias is not None:
            index = self._row_of_each(running, x).to(x.device)
            y = (y.reshape(-1, y.shape[-1]) + way.bias.to(y.dtype)[index]).view(output.shape)
        for a, b, scales in way.apart:
            rows = self._row_of_each(running, x).to(x.device)
            mine = scales[rows] != 0
            part = F.linear(F.linear(x.reshape(-1, x.shape[-1])[mine], a), b) * scales[rows][mine, None]
            y = y.reshape(-1, y.shape[-1]).index_add(0, mine.nonzero()[:, 0], part).view(output.shape)
        return (output + y).to(output.dtype)

    def _add_gathered(self, way: Gathered, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        x = x.reshape(self.rows, -1, x.shape[-1])
        out = output.reshape(self.rows, -1, output.shape[-1])
        if not in_place:
            h = torch.bmm(x.to(way.a.dtype), way.a)
            return torch.baddbmm(out.to(h.dtype), h, way.b).to(output.dtype).view(output.shape)
        h = torch.bmm(self._widened(x, way.a.dtype), way.a)
        wide = self._widened(out, way.b.dtype).baddbmm_(h, way.b)
        if wide is not out:
            out.copy_(wide)  # rounded once
        return output

    def _widened(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``t`` in another type, in memory kept for this: fresh pages cost more than the products."""
        if t.dtype == dtype:
            return t
        if torch.compiler.is_compiling() or t.requires_grad:
            return t.to(dtype)
        kept = self._scratch
        if kept is None or kept.numel() < t.numel() or (kept.dtype, kept.device) != (dtype, t.device):
            self._scratch = torch.empty(t.numel(), dtype=dtype, device=t.device)
        assert self._scratch is not None
        return self._scratch[: t.numel()].view(t.shape).copy_(t)

    def _index_for(self, running: Pass, tokens: int) -> torch.Tensor | None:
        """Packed input: the row of each of a layer's tokens, all of them or those whose logits are asked for."""
        if self.index is None or self.index.shape[0] == tokens:
            return self.index
        if running.logits is not None and running.logits.shape[0] == tokens:
            return running.logits
        raise ShapeError(f"a layer got {tokens} tokens, the packed rows index {self.index.shape[0]}")

    def _row_of_each(self, running: Pass, x: torch.Tensor) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1]
        index = self._index_for(running, tokens)
        if index is not None:
            return index
        rows_of_layer(x, running.rows)
        return torch.repeat_interleave(torch.arange(self.rows), tokens // self.rows)

    def scale(self, way: Dense, running: Pass, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``where(S != 0, h * S, 0)``, each token of ``h [..., R]`` with its row's S; ``x`` is the layer's input."""
        rank = way.scales.shape[1]
        tokens = h.numel() // max(rank, 1)
        index = self._index_for(running, tokens)
        if index is not None:
            flat = h.reshape(-1, rank)
            index = index.to(h.device)
            return torch.where(way.mask[index], flat * way.scales[index], 0).reshape(h.shape)
        self._check(way, running, x)
        each = h.reshape(self.rows, tokens // self.rows, rank)
        return torch.where(way.mask[:, None], each * way.scales[:, None], 0).reshape(h.shape)

    def _check(self, way: Way, running: Pass, x: torch.Tensor) -> None:
        """ShapeError unless a layer's input is the batch's, row by row."""
        if running.uneven and way.pictures and x.dim() == 2:
            raise ShapeError(
                f"{way.name} got patches of pictures that differ in size or number from row to row; rows are told only "
                "where each has as many patches"
            )
        rows_of_layer(x, running.rows, way.name)

    def _choose(self, factors: Factors) -> Way:
        ranks = {slot.entry: slot.rank for slot in factors.slots}
        in_use = sum(rank for entry, rank in ranks.items() if entry in self.active)
        widest = max((sum(ranks.get(n, 0) for n in row) for row in self.wanted), default=0)
        bias = self._biases(factors)
        if (
            bias is None
            and self.index is None
            and widest * DENSE_WASTE <= in_use
            and widest * self.rows <= MAX_GATHERED * factors.rank
        ):
            return self._gather(factors, max(widest, 1))
        slots = [slot for slot in factors.slots if slot.entry in self.active and slot.finite]
        scales = self._scales(factors, slots)
        dtype = product_type(factors)
        a, b = factors.a, factors.b
        if len(slots) < len(factors.slots):
            used = torch.tensor([slot.entry in self.active and slot.finite for slot in factors.slots])
            picked = torch.repeat_interleave(used, torch.tensor([slot.rank for slot in factors.slots])).to(a.device)
            a, b = a[picked], b[:, picked]
        return Dense(a.to(dtype), b.to(dtype), scales.to(dtype), scales != 0, self._apart(factors, dtype), bias)

    def _apart(
        self, factors: Factors, dtype: torch.dtype
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        found, at = [], 0
        for slot in factors.slots:
            stop = at + slot.rank
            if not slot.finite and slot.entry in self.active:
                scales = (self.table[:, slot.entry] * slot.scaling).to(factors.a.device, dtype)
                found.append((factors.a[at:stop].to(dtype), factors.b[:, at:stop].to(dtype), scales))
            at = stop
        return tuple(found)

    def _gather(self, factors: Factors, widest: int) -> Gathered:
        dtype = product_type(factors)
        a = factors.a.new_zeros((self.rows, widest, factors.a.shape[1]), dtype=dtype)
        b = factors.b.new_zeros((self.rows, widest, factors.b.shape[0]), dtype=dtype)
        starts, at = {}, 0
        for slot in factors.slots:
            starts[slot.entry] = (at, slot)
            at += slot.rank
        for row, entries in enumerate(self.wanted):
            to = 0
            for entry in entries:
                if entry in starts:
                    start, slot = starts[entry]
                    stop, end = start + slot.rank, to + slot.rank
                    a[row, to:end] = factors.a[start:stop]
                    multiplier = float(self.table[row, entry]) * slot.scaling
                    torch.mul(factors.b[:, start:stop].t().to(dtype), multiplier, out=b[row, to:end])
                    to = end
        return Gathered(a.transpose(1, 2).contiguous(), b)  # a quarter faster in bmm than a transposed view

    def _scales(self, factors: Factors, slots: list) -> torch.Tensor:
        """``[rows, R]``: each row's scale times the scaling of every rank row of these adapters."""
        parts = [(self.table[:, slot.entry, None] * slot.scaling).expand(-1, slot.rank) for slot in slots]
        whole = torch.cat(parts, 1) if parts else self.table.new_zeros((self.rows, 0))
        return whole.to(factors.a.device)


def product_type(factors: Factors) -> torch.dtype:
    """The type rows are computed in: float32 on a CPU, where products in 16 bits are many times as slow."""
    return torch.float32 if factors.a.device.type == "cpu" and factors.a.element_size() == 2 else factors.a.dtype
