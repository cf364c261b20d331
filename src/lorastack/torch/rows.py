"""Mixtures by row: every row of a batch has its own scales, as a matrix rows x adapters.

What the rows of a batch come to is made once for each `Layout`; how a layer computes it is a way of `ways/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lorastack.errors import ShapeError
from lorastack.torch.layout import sees_pictures
from lorastack.torch.passes import Pass
from lorastack.torch.plan import rows_of_layer
from lorastack.torch.tiles import Layout, Tiles, Wanted
from lorastack.torch.ways.board import Board, Numbers


class Mixture:
    """The scales of each row for each adapter, and how tokens belong to rows.

    Parameters
    ----------
    wanted
        For each row its adapters, by position, and their scales; of so many ``adapters``.
    index
        For packed input: the row of every token, ``[tokens]``. Without it the batch is split evenly, so
        that beams and returned sequences, which repeat rows, follow their row.
    layouts
        Those of the layers.
    way
        What was asked for; see `ways.choice`.
    paged
        The layouts of layers that may be computed by pages.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        adapters: int,
        index: torch.Tensor | None,
        layouts: Iterable[Layout],
        way: str | None = None,
        paged: Sequence[Layout] = (),
    ) -> None:
        self.index, self.way = index, way
        #: Weight -> what it was computed in, where that is not its own way.
        self.taken: dict[str, str] = {}
        self.rows = len(wanted)
        self.adapters = adapters
        self._wanted = wanted
        layouts = tuple(layouts)
        #: The index where layers are, so that no layer copies it.
        self._index_on = {} if index is None else {one.device: index.to(one.device) for one in layouts}
        table = self._table(wanted)
        self._tiles = {id(layout): (layout, Tiles(layout, wanted, table)) for layout in layouts}
        #: Of the page kernels: where they may be, the plan's page numbers, and the boards of each shape of batch.
        self._paged = {layout.device: layout for layout in paged}
        self._numbers: Numbers | None = None
        self._boards: dict[tuple[int, str], tuple[Board, ...]] = {}
        self._each: dict[tuple[int, str], np.ndarray] = {}
        for layout in paged:
            if layout.pages is None:
                layout.pages = self.numbers.of_layer(layout)
        self._stretches: tuple[torch.Tensor, list[tuple[int, int, int]]] | None = None

    def _table(self, wanted: Sequence[Wanted]) -> torch.Tensor:
        """``[rows, adapters]``."""
        table = np.zeros((self.rows, self.adapters), np.float32)
        for row, mine in enumerate(wanted):
            for entry, scale in mine:
                table[row, entry] = scale
        return torch.from_numpy(table)

    def write(self, wanted: Sequence[Wanted]) -> None:
        """Other mixtures in the same memory.

        Raises
        ------
        ArgumentError
            When a board has no room for them; nothing is changed then.
        """
        ready = [
            (board, board.composed(wanted, self._each[key], self.numbers))
            for key, boards in self._boards.items()
            for board in boards
        ]
        for board, host in ready:
            board.put(host)
        table, self._wanted = self._table(wanted), wanted
        for _, tiles in self._tiles.values():
            tiles.write(wanted, table)

    def tiles(self, layout: Layout) -> Tiles:
        """What the rows want where adapters lie so."""
        return self._tiles[id(layout)][1]

    @property
    def numbers(self) -> Numbers:
        """The plan's page numbers."""
        if self._numbers is None:
            self._numbers = Numbers.of([layout for layout, _ in self._tiles.values()])
        return self._numbers

    def boards(self, running: Pass | None, tokens: int, layout: Layout) -> tuple[Board, ...]:
        """The tiles of a layer of so many tokens, a board for each size; written when the first such layer comes."""
        known = self._boards.get((tokens, layout.where))
        if known is not None and (self.index is None or tokens == len(self.index)):
            return known
        index = self.index_for(running, tokens)
        each = np.arange(self.rows).repeat(tokens // self.rows) if index is None else index.numpy()
        boards = Board.for_batch(self._wanted, each, self.numbers, layout.device)
        if index is self.index:
            self._each[tokens, layout.where] = each
            self._boards[tokens, layout.where] = boards
        return boards

    def foresee(self, tokens: int) -> None:
        """Write the boards of a pass of so many tokens where it begins: compiled code cannot."""
        tokens = tokens if self.index is None else len(self.index)
        for layout in self._paged.values():
            if not self.foreseen(tokens, layout) and (self.index is not None or tokens % self.rows == 0):
                self.boards(None, tokens, layout)

    def foreseen(self, tokens: int, layout: Layout) -> bool:
        """Whether the boards of such a layer are there."""
        return (tokens, layout.where) in self._boards

    def index_for(self, running: Pass | None, tokens: int) -> torch.Tensor | None:
        """Packed input: the row of each of a layer's tokens, all of them or those whose logits are asked for."""
        if self.index is None or self.index.shape[0] == tokens:
            return self.index
        if running is not None and running.logits is not None and running.logits.shape[0] == tokens:
            return running.logits
        raise ShapeError(f"a layer got {tokens} tokens, the packed rows index {self.index.shape[0]}")

    def index_on(self, running: Pass, tokens: int, device: torch.device) -> torch.Tensor | None:
        """The same on a device."""
        index = self.index_for(running, tokens)
        if index is None or index.device == device:
            return index
        known = self._index_on.get(device) if index is self.index else None
        return index.to(device) if known is None else known

    def stretches(self, running: Pass, tokens: int) -> list[tuple[int, int, int]]:
        """Packed input: (row, first token, end) of tokens that follow each other and are of one row."""
        index = self.index_for(running, tokens)
        known = self._stretches
        if known is not None and known[0] is index:
            return known[1]
        assert index is not None
        rows, counts = torch.unique_consecutive(index, return_counts=True)
        found, at = [], 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            found.append((row, at, at + count))
            at += count
        self._stretches = (index, found)
        return found

    def masked(self, layout: Layout, running: Pass, h: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """``where(S != 0, h * S, 0)``, each token of ``h [..., R]`` with its row's S; ``x`` is the layer's input.

        So that Inf or NaN of an adapter that a row does not use cannot reach it.
        """
        tiles = self.tiles(layout)
        tokens = x.numel() // x.shape[-1] if x is not h else h.numel() // max(h.shape[-1], 1)
        index = self.index_on(running, tokens, h.device)
        if index is not None:
            flat = h.reshape(len(index), -1)
            return torch.where(tiles.mask[index], flat * tiles.scales[index], 0).reshape(h.shape)
        self.check(running, x, name)
        each = h.reshape(self.rows, -1, h.shape[-1])
        return torch.where(tiles.mask[:, None], each * tiles.scales[:, None], 0).reshape(h.shape)

    def spread(
        self, layout: Layout, entry: int, running: Pass, like: torch.Tensor, channels_last: bool
    ) -> torch.Tensor:
        """Each row's multiplier of an adapter, shaped for a product with what is ``like`` a layer's output."""
        column = self.tiles(layout).by_entry[:, entry].to(like.device)
        if not channels_last:
            return column.repeat_interleave(like.shape[0] // self.rows).view(-1, *[1] * (like.dim() - 1))
        tokens = like.numel() // like.shape[-1]
        index = self.index_on(running, tokens, like.device)
        each = column[index] if index is not None else column.repeat_interleave(tokens // self.rows)
        return each.view(*like.shape[:-1], 1)

    def check(self, running: Pass, x: torch.Tensor, name: str) -> None:
        """ShapeError unless a layer's input is the batch's, row by row."""
        if running.uneven and x.dim() == 2 and sees_pictures(name):
            raise ShapeError(
                f"{name} got patches of pictures that differ in size or number from row to row; rows are told only "
                "where each has as many patches"
            )
        rows_of_layer(x, running.rows, name)


def product_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type rows are computed in: float32 on a CPU, where products in 16 bits are many times as slow."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype
