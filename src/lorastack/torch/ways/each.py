"""Each: every row is multiplied with its own adapters' factors where they lie, and meets no others. For CPUs.

Nothing is copied or gathered. Rows that follow each other, and whose adapters lie at equal distances (each row the next
adapter, or all the same), are one product of many matrices, which is a view of the factors. With several threads rows
of several tokens are a product each: a thread's part of a matrix depends on how many there are.
"""

from __future__ import annotations

import threading

import torch

from lorastack.torch.passes import Pass
from lorastack.torch.rows import Mixture
from lorastack.torch.tiles import Pair
from lorastack.torch.ways import Layer


class Each:
    """Products of each row's own."""

    name = "each"

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        mixture: Mixture = running.mixture
        a, b = layer.a, layer.b
        if a.dtype != layer.layout.dtype:
            a, b = _widened_ranks(mixture, layer, a, "a"), _widened_ranks(mixture, layer, b, "b")
        if mixture.index is None:
            mixture.check(running, x, layer.name)
        wide_x = _widened(x, a.dtype, "x")
        fresh = output if in_place else output.clone(memory_format=torch.contiguous_format)
        wide = _widened(fresh, b.dtype, "output")
        tokens = x.numel() // x.shape[-1]
        each = tokens // mixture.rows
        if mixture.index is None and (each == 1 or torch.get_num_threads() == 1):
            shape = (mixture.rows, each, -1)
            _together(mixture, layer, wide_x.reshape(shape), wide.view(shape), a, b)
        else:
            _several(mixture, layer, running, wide_x.reshape(tokens, -1), wide.view(tokens, -1), a, b)
        if wide is not fresh:
            fresh.copy_(wide)  # rounded once
        return fresh


def _together(
    mixture: Mixture, layer: Layer, x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    n_in, n_out = a.shape[1], b.shape[1]
    for row, rows, first, step, rank, scales in mixture.tiles(layer.layout).runs:
        # [rows, in, rank] and [rows, rank, out], the same memory for rows of the same adapter
        own_a = a.as_strided((rows, n_in, rank), (step * n_in, 1, n_in), first * n_in)
        own_b = b.as_strided((rows, rank, n_out), (step * n_out, n_out, 1), first * n_out)
        whole = rows == len(out)
        h = torch.bmm(x if whole else x.narrow(0, row, rows), own_a)
        if scales is not None:
            h.mul_(scales)
        (out if whole else out.narrow(0, row, rows)).baddbmm_(h, own_b)


def _several(
    mixture: Mixture, layer: Layer, running: Pass, x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    pairs = mixture.tiles(layer.layout).pairs
    if mixture.index is None:
        each = len(out) // mixture.rows
        work = [(pair[0] * each, each, pair) for pair in pairs]
    else:
        own: dict[int, list[Pair]] = {}
        for pair in pairs:
            own.setdefault(pair[0], []).append(pair)
        work = [
            (at, end - at, pair) for row, at, end in mixture.stretches(running, len(out)) for pair in own.get(row, ())
        ]
    for at, tokens, (_, first, rank, multiplier) in work:
        h = torch.mm(x.narrow(0, at, tokens), a.narrow(0, first, rank).t())
        out.narrow(0, at, tokens).addmm_(h.mul_(multiplier), b.narrow(0, first, rank))


class _Kept(threading.local):
    """Memory for wider copies, of each thread's own: fresh pages cost more than the products."""

    def __init__(self) -> None:
        self.by_use: dict[str, torch.Tensor] = {}


_KEPT = _Kept()


def _widened(t: torch.Tensor, dtype: torch.dtype, use: str) -> torch.Tensor:
    """``t`` in another type, in memory kept for that."""
    return t if t.dtype == dtype else _kept(t, dtype, use).copy_(t)


def _widened_ranks(mixture: Mixture, layer: Layer, t: torch.Tensor, use: str) -> torch.Tensor:
    """The ranks of factors that are used, in the type rows are computed in and at their place; others are anything."""
    kept = _kept(t, layer.layout.dtype, use)
    for first, ranks in mixture.tiles(layer.layout).used:
        kept.narrow(0, first, ranks).copy_(t.narrow(0, first, ranks))
    return kept


def _kept(like: torch.Tensor, dtype: torch.dtype, use: str) -> torch.Tensor:
    numbers, kept = like.numel(), _KEPT.by_use.get(use)
    if kept is None or kept.numel() < numbers or kept.dtype != dtype or kept.device != like.device:
        kept = _KEPT.by_use[use] = torch.empty(numbers, dtype=dtype, device=like.device)
    return kept[:numbers].view(like.shape)


EACH = Each()
