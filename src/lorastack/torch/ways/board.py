"""Board: what the page kernels read of a composition - tiles of rows with one page set, their pages and scales.

A few small arrays, built on the host and copied once; every layer reads the same ones, each through a static array from
the plan's page numbers to its own. Sizes are capacities, powers of two: a board is written again for another
composition of the same capacity, which a captured graph does not notice. A board has tiles of one size; rows of many
tokens have larger ones than rows of few, whatever rows are beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorastack.errors import ArgumentError
from lorastack.torch.pool import PAGE
from lorastack.torch.tiles import Layout, Wanted

#: (tokens, rows): from so many tokens of a row on its tiles have so many rows; 16 is the least a tensor core takes.
TILES = ((512, 128), (64, 64), (0, 16))
#: Pages of a row that a board has room for in any case.
_PAGES = 4


def tile_of(tokens: int) -> int:
    """Rows of a tile where a row has so many tokens.

    >>> tile_of(1), tile_of(100), tile_of(2048)
    (16, 64, 128)
    """
    return next(rows for least, rows in TILES if tokens >= least)


class PageMap(NamedTuple):
    """A layer's own page of each of the plan's, ``[pages]`` each: where its ranks begin, -1 where it has none, and how
    many there are, int32; and the adapter's scaling, float32.
    """

    first: torch.Tensor
    ranks: torch.Tensor
    scaling: torch.Tensor


class Numbers(NamedTuple):
    """The plan's page numbers: an adapter has as many as in the layer where it has the most ranks."""

    first: dict[int, int]
    pages: dict[int, int]
    total: int

    @staticmethod
    def of(layouts: Sequence[Layout]) -> Numbers:
        most: dict[int, int] = {}
        for layout in layouts:
            for entry, (_, rank, _) in layout.spans.items():
                most[entry] = max(most.get(entry, 0), -(-rank // PAGE))
        first, at = {}, 0
        for entry in sorted(most):
            first[entry] = at
            at += most[entry]
        return Numbers(first, most, at)

    def of_layer(self, layout: Layout) -> PageMap:
        """The pages of a layer where adapters lie so."""
        many = max(self.total, 1)
        first, ranks, scaling = np.full(many, -1, np.int32), np.zeros(many, np.int32), np.zeros(many, np.float32)
        for entry, (first_rank, rank, own) in layout.spans.items():
            begins = np.arange(0, rank, PAGE)
            at = slice(self.first[entry], self.first[entry] + len(begins))
            first[at], ranks[at], scaling[at] = first_rank + begins, np.minimum(rank - begins, PAGE), own
        return PageMap(*(torch.from_numpy(array).to(layout.device) for array in (first, ranks, scaling)))


class Arrays(NamedTuple):
    """What is in a board's memory: ``rows [tiles * tile]`` tokens or -1, ``slot_tile`` and ``slot_page [slots]`` (-1
    beyond the last), ``tile_slot`` and ``tile_n [tiles]`` (0 beyond the last), all int32; and ``scales [slots * tile]``
    in float32.
    """

    rows: torch.Tensor
    slot_tile: torch.Tensor
    slot_page: torch.Tensor
    tile_slot: torch.Tensor
    tile_n: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def sizes(tile: int, tiles: int, slots: int) -> tuple[int, ...]:
        return tiles * tile, slots, slots, tiles, tiles, slots * tile

    @staticmethod
    def of(memory: torch.Tensor, tile: int, tiles: int, slots: int) -> Arrays:
        parts = torch.split(memory, list(Arrays.sizes(tile, tiles, slots)))
        rows, slot_tile, slot_page, tile_slot, tile_n, scales = parts
        return Arrays(rows, slot_tile, slot_page, tile_slot, tile_n, scales.view(torch.float32))


class Board:
    """The arrays of one capacity, for the rows whose tiles have ``tile`` rows; `write` puts a composition there."""

    def __init__(self, tile: int, tiles: int, slots: int, device: torch.device) -> None:
        self.tile, self.tiles, self.slots = tile, tiles, slots
        self.memory = torch.zeros(sum(Arrays.sizes(tile, tiles, slots)), dtype=torch.int32, device=device)
        self.arrays = Arrays.of(self.memory, tile, tiles, slots)
        #: Slots that the composition takes.
        self.filled = 0

    @staticmethod
    def for_batch(
        wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers, device: torch.device
    ) -> tuple[Board, ...]:
        """Boards with room for what such a batch may come to: a page set for each row, four pages a row or more."""
        most = max((sum(numbers.pages.get(n, 0) for n, _ in mine) for mine in wanted), default=1)
        needed: dict[int, int] = {}
        for tokens in np.bincount(each, minlength=len(wanted)).tolist():
            if tokens:
                tile = tile_of(tokens)
                needed[tile] = needed.get(tile, 0) + -(-tokens // tile)
        boards = tuple(
            Board(tile, _power(tiles), _power(tiles) * _power(max(most, _PAGES)), device)
            for tile, tiles in sorted(needed.items())
        )
        for board in boards:
            board.write(wanted, each, numbers)
        return boards

    def write(self, wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers) -> None:
        """Put a composition there: ``each [tokens]`` is the row of every token.

        Raises
        ------
        ArgumentError
            When it does not have the room.
        """
        self.put(self.composed(wanted, each, numbers))

    def put(self, host: np.ndarray) -> None:
        """Copy there what `composed` made."""
        self.memory.copy_(torch.from_numpy(host))
        pages = slice(self.tiles * self.tile + self.slots, self.tiles * self.tile + 2 * self.slots)
        self.filled = int((host[pages] >= 0).sum())

    def composed(self, wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers) -> np.ndarray:
        """All arrays of a composition, side by side; of the rows whose tiles are of this size.

        Raises
        ------
        ArgumentError
            When it does not have the room.
        """
        sizes = Arrays.sizes(self.tile, self.tiles, self.slots)
        host = np.zeros(sum(sizes), np.int32)
        rows, slot_tile, slot_page, tile_slot, tile_n, scales = np.split(host, np.cumsum(sizes)[:-1])
        floats = scales.view(np.float32)
        rows[:], slot_page[:] = -1, -1
        groups: dict[tuple[int, ...], list[int]] = {}
        tokens_of = _tokens(each, len(wanted))
        for row, mine in enumerate(wanted):
            known = tuple(entry for entry, _ in mine if entry in numbers.first)
            if known and tile_of(len(tokens_of[row])) == self.tile:
                groups.setdefault(known, []).append(row)
        tile = slot = 0
        for entries, members in groups.items():
            tokens = np.concatenate([tokens_of[row] for row in members])
            owner = np.repeat(members, [len(tokens_of[row]) for row in members])
            scale_of = {row: dict(wanted[row]) for row in members}
            pages = [(entry, numbers.first[entry] + n) for entry in entries for n in range(numbers.pages[entry])]
            for at in range(0, len(tokens), self.tile):
                part, own = tokens[at : at + self.tile], owner[at : at + self.tile].tolist()
                if tile >= self.tiles or slot + len(pages) > self.slots:
                    raise ArgumentError(
                        f"this composition needs more than {self.tiles} tiles of rows and {self.slots} pages of tiles"
                    )
                rows[tile * self.tile : tile * self.tile + len(part)] = part
                tile_slot[tile], tile_n[tile] = slot, len(pages)
                for entry, page in pages:
                    slot_tile[slot], slot_page[slot] = tile, page
                    floats[slot * self.tile : slot * self.tile + len(part)] = [scale_of[row][entry] for row in own]
                    slot += 1
                tile += 1
        return host


def _tokens(each: np.ndarray, rows: int) -> list[np.ndarray]:
    order = np.argsort(each, kind="stable")
    return np.split(order, np.searchsorted(each[order], np.arange(1, rows)))


def _power(n: int) -> int:
    """The power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()
