"""Board: what the page kernels read of a composition - tiles of rows with one page set, their pages and scales.

A few small arrays, built on the host and copied once; every layer reads the same ones, each through a static array from
the plan's page numbers to its own. Sizes are capacities, powers of two: a board is written again for another
composition of the same capacity, which a captured graph does not notice. A board has tiles of one size; rows of many
tokens have larger ones than rows of few, whatever rows are beside them.
"""

from __future__ import annotations

from collections import Counter
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

    def pages_of(self, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(How many pages each group of adapters has; these, group by group; which adapter of its group each is of)."""
        own = {entry: range(at, at + self.pages[entry]) for entry, at in self.first.items()}
        many: list[int] = []
        pages: list[int] = []
        nth: list[int] = []
        for group in groups:
            before = len(pages)
            for n, entry in enumerate(group):
                pages += own[entry]
                nth += [n] * len(own[entry])
            many.append(len(pages) - before)
        return np.array(many), np.array(pages), np.array(nth)

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
        most = max((sum([numbers.pages.get(n, 0) for n, _ in mine]) for mine in wanted), default=1)
        needed: dict[int, int] = {}
        for tokens, rows in Counter(np.bincount(each, minlength=len(wanted)).tolist()).items():
            if tokens:
                tile = tile_of(tokens)
                needed[tile] = needed.get(tile, 0) + rows * -(-tokens // tile)
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
        rows[:], slot_page[:] = -1, -1
        group_of, groups, first_scale, scale_of = self._groups(wanted, each, numbers)
        if not groups:
            return host
        # The tokens in the order of their groups, and of their rows in each; tiles are filled one after the other.
        order = np.lexsort((each, group_of[each]))
        order = order[group_of[each[order]] >= 0]
        own = group_of[each[order]]
        tokens = np.bincount(own, minlength=len(groups))
        tiles = -(-tokens // self.tile)
        lane = np.arange(len(order)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
        place = np.repeat(np.cumsum(tiles) - tiles, tokens) * self.tile + lane
        # Each tile's slots: the pages of its group's adapters.
        many, pages, entry_of = numbers.pages_of(groups)
        tile_group = np.repeat(np.arange(len(groups)), tiles)
        taken = many[tile_group]
        slots, filled = int(taken.sum()), len(tile_group)
        if filled > self.tiles or slots > self.slots:
            raise ArgumentError(
                f"this composition needs more than {self.tiles} tiles of rows and {self.slots} pages of tiles"
            )
        rows[place] = order
        tile_n[:filled], tile_slot[:filled] = taken, np.cumsum(taken) - taken
        slot_tile[:slots] = np.repeat(np.arange(filled), taken)
        nth = np.arange(slots) - np.repeat(tile_slot[:filled], taken)
        page = np.repeat((np.cumsum(many) - many)[tile_group], taken) + nth
        slot_page[:slots] = pages[page]
        lanes = rows.reshape(-1, self.tile)[slot_tile[:slots]]
        wants = np.where(lanes >= 0, first_scale[each[lanes]] + entry_of[page][:, None], 0)
        scales.view(np.float32).reshape(-1, self.tile)[:slots] = scale_of[wants]
        return host

    def _groups(
        self, wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers
    ) -> tuple[np.ndarray, list[tuple[int, ...]], np.ndarray, np.ndarray]:
        """(Each row's group, -1 without one; the adapters of each; where a row's scales begin; 0 and the scales)."""
        tokens = np.bincount(each, minlength=len(wanted)).tolist()
        here = {many for many in set(tokens) if tile_of(many) == self.tile}
        known: dict[tuple[int, ...], int] = {}
        group_of, first_scale = np.full(len(wanted), -1), np.zeros(len(wanted), np.int64)
        scales: list[float] = [0.0]  # of lanes without a row
        for row, mine in enumerate(wanted):
            if mine and tokens[row] in here:
                group = tuple([entry for entry, _ in mine if entry in numbers.first])
                group_of[row] = known.setdefault(group, len(known)) if group else -1
                first_scale[row] = len(scales)
                scales += [scale for entry, scale in mine if entry in numbers.first]
        return group_of, list(known), first_scale, np.array(scales, np.float32)


def _power(n: int) -> int:
    """The power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()
