"""Launch: the page kernels with the sizes of their blocks, on tensors; and both as one operator, for compiled code.

Blocks and splits depend on the layer's shape and on the size of a tile alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorastack.torch.pool import PAGE
from lorastack.torch.ways.board import Arrays, PageMap

#: Layers that one shrink serves at most.
TOGETHER = 3
#: Columns that a program of the expand writes.
BN = 128
#: Columns that a split of the shrink is a multiple of.
_BLOCK = 128
_MOST_SPLITS = 8


class Blocks(NamedTuple):
    """Of a size of tile: columns that a program of the shrink reads at a time, and warps of both kernels."""

    bk: int
    shrink_warps: int
    expand_warps: int


#: By rows of a tile. What lies in shared memory at a time has to fit in 99 KiB, which is all that some GPUs have.
BLOCKS = {16: Blocks(128, 4, 2), 64: Blocks(64, 4, 4), 128: Blocks(64, 4, 8)}


def stages_of(itemsize: int) -> int:
    """How many blocks of the shrink are on their way at a time."""
    return 3 if itemsize <= 2 else 2


def splits_of(n_in: int) -> tuple[int, int]:
    """How many parts the sum over a layer's inputs has, and the length of each.

    >>> splits_of(4096), splits_of(100), splits_of(1100)
    ((8, 512), (1, 128), (5, 256))
    """
    blocks = -(-n_in // _BLOCK)
    each = -(-blocks // _MOST_SPLITS)
    return -(-blocks // each), each * _BLOCK


def shrink(
    x: torch.Tensor, factors: Sequence[torch.Tensor], pages: Sequence[PageMap], arrays: Arrays
) -> list[torch.Tensor]:
    """The partial sums of up to three layers, whose A are ``[R, in]``, at ``x [tokens, in]``."""
    from lorastack.torch.ways.kernels import shrink as kernel

    many, slots = len(factors), len(arrays.slot_page)
    tile = len(arrays.rows) // len(arrays.tile_n)
    splits, length = splits_of(x.shape[1])
    blocks, stages = BLOCKS[tile], stages_of(x.element_size())
    part = torch.empty((many, splits * slots * tile * PAGE), dtype=torch.float32, device=x.device)
    # A place that is not taken has the first layer's, which nobody reads there.
    three = [n if n < many else 0 for n in range(TOGETHER)]
    kernel[(slots, splits, many)](
        x, *(factors[n] for n in three), *(pages[n].first for n in three), *(pages[n].ranks for n in three),
        part, arrays.rows, arrays.slot_tile, arrays.slot_page, slots, x.stride(0),
        K=x.shape[1], R=PAGE, BM=tile, BK=blocks.bk, KS=length, LAYERS=many,
        num_warps=blocks.shrink_warps, num_stages=stages,
    )  # fmt: skip
    return list(part)


def expand(y: torch.Tensor, n_in: int, b: torch.Tensor, part: torch.Tensor, pages: PageMap, arrays: Arrays) -> None:
    """Add to ``y [tokens, out]`` what the partial sums of a layer of so many inputs come to; its B is ``[R, out]``."""
    from lorastack.torch.ways.kernels import expand as kernel

    n_out, tiles, slots = y.shape[1], len(arrays.tile_n), len(arrays.slot_page)
    tile = len(arrays.rows) // tiles
    kernel[(tiles, -(-n_out // BN))](
        y, b, part, arrays.rows, arrays.tile_slot, arrays.tile_n, arrays.slot_page, pages.first, pages.ranks,
        pages.scaling, arrays.scales, slots, y.stride(0),
        N=n_out, R=PAGE, BM=tile, BN=BN, SPLITS=splits_of(n_in)[0], num_warps=BLOCKS[tile].expand_warps, num_stages=2,
    )  # fmt: skip


@torch.library.custom_op("lorastack::add_pages", mutates_args=("y",))
def add_pages(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: torch.Tensor, ranks: torch.Tensor,
    scaling: torch.Tensor, board: torch.Tensor, tile: int, tiles: int, slots: int,
) -> None:  # fmt: skip
    """``y [tokens, out]`` plus what a board's rows want of ``x [tokens, in]``; torch.compile does not look into it."""
    arrays, pages = Arrays.of(board, tile, tiles, slots), PageMap(first, ranks, scaling)
    (part,) = shrink(x, [a], [pages], arrays)
    expand(y, x.shape[1], b, part, pages, arrays)


@add_pages.register_fake
def _(*_: object) -> None:
    """Nothing comes of it but ``y``."""
