"""Pages: two Triton kernels over tiles of rows with one page set; for CUDA, and for the interpreter in tests.

Blocks and splits depend on the layer's shape alone. Compiled code and gradients go through `dense`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from lorastack.torch.passes import Pass
from lorastack.torch.pool import PAGE
from lorastack.torch.ways import Layer
from lorastack.torch.ways.board import TILE, Board, PageMap

#: Columns that a program of the shrink reads at a time, and of the expand writes.
_BK, _BN = 128, 128
_MOST_SPLITS = 8


@cache
def there_is_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def splits_of(n_in: int) -> tuple[int, int]:
    """How many parts the sum over a layer's inputs has, and the length of each.

    >>> splits_of(4096), splits_of(100), splits_of(1100)
    ((8, 512), (1, 128), (5, 256))
    """
    blocks = -(-n_in // _BK)
    each = -(-blocks // _MOST_SPLITS)
    return -(-blocks // each), each * _BK


class Pages:
    """Shrink and expand."""

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        mixture = running.mixture
        tokens = x.numel() // x.shape[-1]
        if mixture.index is None:
            mixture.check(running, x, layer.name)
        board = mixture.board(running, tokens, layer.layout.device)
        y = output if in_place else output.clone(memory_format=torch.contiguous_format)
        launch(y.view(tokens, -1), x.reshape(tokens, -1), layer, board, mixture.pages_of(layer.layout))
        return y


def launch(y: torch.Tensor, x: torch.Tensor, layer: Layer, board: Board, pages: PageMap) -> None:
    """``y [tokens, out]`` plus what the board's rows want of ``x [tokens, in]``."""
    from lorastack.torch.ways.kernels import expand, shrink

    n_in, n_out = x.shape[1], y.shape[1]
    splits, length = splits_of(n_in)
    part = torch.empty(splits * board.slots * TILE * PAGE, dtype=torch.float32, device=x.device)
    shrink[(board.slots, splits)](
        x, layer.a, part, board.rows, board.slot_tile, board.slot_page, pages.first, pages.ranks, board.slots,
        x.stride(0), K=n_in, R=PAGE, BM=TILE, BK=_BK, KS=length, num_warps=4, num_stages=3,
    )  # fmt: skip
    expand[(board.tiles, -(-n_out // _BN))](
        y, layer.b, part, board.rows, board.tile_slot, board.tile_n, board.slot_page, pages.first, pages.ranks,
        pages.scaling, board.scales, board.slots, y.stride(0),
        N=n_out, R=PAGE, BM=TILE, BN=_BN, SPLITS=splits, num_warps=2, num_stages=2,
    )  # fmt: skip


PAGES = Pages()
