"""Board: what the page kernels read of a composition - tiles of rows with one page set, their pages and scales.

A few small arrays, built on the host and copied once; every layer reads the same ones, each through a static array from
the plan's page numbers to its own. Sizes are capacities, powers of two: a board is written again for another
composition of the same capacity, which a captured graph does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorastack.errors import ArgumentError
from lorastack.torch.pool import PAGE
from lorastack.torch.tiles import Layout, Wanted

#: Rows of a tile, the least that a tensor core takes.
TILE = 16
#: Pages of a row that a board has room for in any case.
_PAGES = 4


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


class Board:
    """The arrays of one capacity; `write` puts a composition there.

    ``rows [tiles * 16]`` tokens or -1, ``slot_tile`` and ``slot_page [slots]`` (-1 beyond the last), ``tile_slot`` and
    ``tile_n [tiles]`` (0 beyond the last), all int32; ``scales [slots * 16]`` float32.
    """

    def __init__(self, tiles: int, slots: int, device: torch.device) -> None:
        self.tiles, self.slots = tiles, slots
        self._sizes = (tiles * TILE, slots, slots, tiles, tiles, slots * TILE)
        self._memory = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        parts = torch.split(self._memory, list(self._sizes))
        self.rows, self.slot_tile, self.slot_page, self.tile_slot, self.tile_n = parts[:5]
        self.scales = parts[5].view(torch.float32)

    @staticmethod
    def for_batch(wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers, device: torch.device) -> Board:
        """A board with room for what such a batch may come to: a page set for each row, four pages a row or more."""
        most = max((sum(numbers.pages.get(n, 0) for n, _ in mine) for mine in wanted), default=1)
        full = np.bincount(each, minlength=len(wanted)) if len(each) else np.zeros(1, int)
        tiles = _power(int((-(-full // TILE)).sum()))
        return Board(tiles, tiles * _power(max(most, _PAGES)), device)

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
        self._memory.copy_(torch.from_numpy(host))

    def composed(self, wanted: Sequence[Wanted], each: np.ndarray, numbers: Numbers) -> np.ndarray:
        """All arrays of a composition, side by side.

        Raises
        ------
        ArgumentError
            When it does not have the room.
        """
        host = np.zeros(sum(self._sizes), np.int32)
        rows, slot_tile, slot_page, tile_slot, tile_n, scales = np.split(host, np.cumsum(self._sizes)[:-1])
        floats = scales.view(np.float32)
        rows[:], slot_page[:] = -1, -1
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, mine in enumerate(wanted):
            known = tuple(entry for entry, _ in mine if entry in numbers.first)
            if known:
                groups.setdefault(known, []).append(row)
        tokens_of = _tokens(each, len(wanted))
        tile = slot = 0
        for entries, members in groups.items():
            tokens = np.concatenate([tokens_of[row] for row in members])
            owner = np.repeat(members, [len(tokens_of[row]) for row in members])
            scale_of = {row: dict(wanted[row]) for row in members}
            pages = [(entry, numbers.first[entry] + n) for entry in entries for n in range(numbers.pages[entry])]
            for at in range(0, len(tokens), TILE):
                part, own = tokens[at : at + TILE], owner[at : at + TILE]
                if tile >= self.tiles or slot + len(pages) > self.slots:
                    raise ArgumentError(
                        f"this composition needs more than {self.tiles} tiles of rows and {self.slots} pages of tiles"
                    )
                rows[tile * TILE : tile * TILE + len(part)] = part
                tile_slot[tile], tile_n[tile] = slot, len(pages)
                for entry, page in pages:
                    slot_tile[slot], slot_page[slot] = tile, page
                    floats[slot * TILE : slot * TILE + len(part)] = [scale_of[row][entry] for row in own.tolist()]
                    slot += 1
                tile += 1
        return host


def _tokens(each: np.ndarray, rows: int) -> list[np.ndarray]:
    order = np.argsort(each, kind="stable")
    return np.split(order, np.searchsorted(each[order], np.arange(1, rows)))


def _power(n: int) -> int:
    """The power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()
