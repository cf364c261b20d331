"""The kernels of the pages: shrink writes the partial sums of each (tile, page, K split) once, expand adds them up.

No atomics, and a fixed order: splits, then a tile's pages. A row of a tile meets the pages of its own adapters only,
and the sizes of blocks depend on the layer's shape and on the row's own tokens, so that its sum does not depend on the
batch around it. Programs beyond what a composition needs end at once, so that a captured graph serves other
compositions of the same capacity. One shrink serves up to three layers that have the same input.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shrink(
    x_ptr, a_0, a_1, a_2, first_0, first_1, first_2, ranks_0, ranks_1, ranks_2,
    part_ptr, rows_ptr, slot_tile, slot_page, n_slots, x_stride,
    K: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """``part[layer, split, slot] [BM, R] = X[tile rows, K split] A[layer][page, K split]^T`` in float32."""
    slot = tl.program_id(0)
    split = tl.program_id(1)
    layer = tl.program_id(2)
    wanted = tl.load(slot_page + slot)
    if wanted < 0:
        return
    tile = tl.load(slot_tile + slot)
    out = part_ptr + ((layer * tl.num_programs(1) + split) * n_slots + slot).to(tl.int64) * BM * R
    # Branches, and no pointer chosen: what is known of each one's alignment is kept. LAYERS is known when this is
    # compiled, so that there are as many branches as layers.
    if layer == 0:
        _shrink_one(x_ptr, a_0, first_0, ranks_0, out, rows_ptr, tile, wanted, split, x_stride, K, R, BM, BK, KS)
    if LAYERS > 1:  # noqa: SIM102
        if layer == 1:
            _shrink_one(x_ptr, a_1, first_1, ranks_1, out, rows_ptr, tile, wanted, split, x_stride, K, R, BM, BK, KS)
    if LAYERS > 2:  # noqa: SIM102
        if layer == 2:
            _shrink_one(x_ptr, a_2, first_2, ranks_2, out, rows_ptr, tile, wanted, split, x_stride, K, R, BM, BK, KS)


@triton.jit
def _shrink_one(
    x_ptr, a_ptr, page_first, page_ranks, out_ptr, rows_ptr, tile, wanted, split, x_stride,
    K: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    begin = tl.load(page_first + wanted)
    if begin >= 0:
        of_m = tl.arange(0, BM)
        of_r = tl.arange(0, R)
        of_k = tl.arange(0, BK)
        rows = tl.load(rows_ptr + tile * BM + of_m)
        live = rows >= 0
        there = of_r < tl.load(page_ranks + wanted)
        first = split * KS
        acc = tl.full((BM, R), 0.0, tl.float32)
        a_at = a_ptr + begin.to(tl.int64) * K + of_r[:, None] * K
        x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride
        for k in range(0, KS, BK):
            at = first + k + of_k
            inside = at < K
            a = tl.load(a_at + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_at + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        tl.store(out_ptr + of_m[:, None] * R + of_r[None, :], acc, mask=live[:, None])


@triton.jit
def expand(
    y_ptr, b_ptr, part_ptr, rows_ptr, tile_slot, tile_n, slot_page, page_first, page_ranks, page_scaling, scale_ptr,
    n_slots, y_stride,
    N: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``Y[tile rows] += sum over pages of where(S != 0, part * S, 0) B[page]``, added once."""
    tile = tl.program_id(0)
    count = tl.load(tile_n + tile)
    if count == 0:
        return
    of_m = tl.arange(0, BM)
    of_r = tl.arange(0, R)
    of_n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = of_n < N
    rows = tl.load(rows_ptr + tile * BM + of_m)
    live = rows >= 0
    first = tl.load(tile_slot + tile)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for j in range(count):
        slot = first + j
        wanted = tl.load(slot_page + slot)
        begin = tl.load(page_first + wanted)
        if begin >= 0:
            h = tl.full((BM, R), 0.0, tl.float32)
            for split in tl.static_range(SPLITS):
                part = part_ptr + (split * n_slots + slot).to(tl.int64) * BM * R
                h += tl.load(part + of_m[:, None] * R + of_r[None, :], mask=live[:, None], other=0.0)
            scale = tl.load(scale_ptr + slot * BM + of_m, mask=live, other=0.0) * tl.load(page_scaling + wanted)
            h = tl.where(scale[:, None] != 0, h * scale[:, None], 0.0).to(b_ptr.dtype.element_ty)
            there = of_r < tl.load(page_ranks + wanted)
            b_at = b_ptr + begin.to(tl.int64) * N + of_r[:, None] * N + of_n[None, :]
            b = tl.load(b_at, mask=there[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(h, b, acc, input_precision="ieee")
    y_at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + of_n[None, :]
    here = live[:, None] & inside[None, :]
    y = tl.load(y_at, mask=here, other=0.0)
    tl.store(y_at, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=here)
