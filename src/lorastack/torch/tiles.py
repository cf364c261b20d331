"""What a batch's mixtures come to where adapters lie in a given way: multipliers by rank, and runs of rows.

Made on the host once for each composition and `Layout`, of which layers alike share one; no layer makes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lorastack.torch.pool import PAGE, Span

#: Entry -> its scale, in the order of the stack; for one row.
Wanted = Sequence[tuple[int, float]]
#: (row, first rank, ranks, multiplier): an adapter of a row.
Pair = tuple[int, int, int, float]


class Layout:
    """Where each adapter's ranks lie in a layer's factors. Layers with the same one share it, and compare by identity.

    Parameters
    ----------
    spans
        Entry -> the first rank, the ranks and the scaling; without the adapters that leave the layer alone.
    total
        Ranks of the factors, those between the spans included.
    dtype, held
        The type that rows are computed in, and that of the factors.
    """

    def __init__(
        self,
        spans: Mapping[int, tuple[int, int, float]],
        total: int,
        dtype: torch.dtype,
        held: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spans, self.total, self.dtype, self.held, self.device = spans, total, dtype, held, device
        #: The device's name: what compiled code looks up is looked up by words and numbers.
        self.where = str(device)
        owner, scaling = torch.zeros(total, dtype=torch.long), torch.zeros(total)
        for entry, (first, rank, own) in spans.items():
            owner[first : first + rank] = entry
            scaling[first : first + rank] = own  # and 0 for ranks that are nobody's
        self._owner, self._scaling = owner.to(device), scaling.to(device)
        self._each: torch.Tensor | None = None
        #: Of the page kernels: a layer's pages by the plan's numbers (`PageMap`).
        self.pages: Any = None
        self.pages_there = sum(-(-rank // PAGE) for _, rank, _ in spans.values())

    def scales(self, table: torch.Tensor) -> torch.Tensor:
        """``[rows, total]``: each row's multiplier of each rank, of a table ``[rows, adapters]``."""
        return table.to(self.device).index_select(1, self._owner).mul_(self._scaling).to(self.dtype)

    def by_entry(self, table: torch.Tensor) -> torch.Tensor:
        """``[rows, adapters]``: each row's multiplier of each adapter, 0 for one that leaves the layer alone."""
        if self._each is None or len(self._each) != table.shape[1]:
            self._each = torch.tensor([self.spans[n][2] if n in self.spans else 0.0 for n in range(table.shape[1])])
        return (table * self._each).to(self.device, self.dtype)


class Run(NamedTuple):
    """Rows that follow each other, whose adapters lie at equal distances: one product for all of them."""

    row: int
    rows: int
    first: int
    step: int
    rank: int
    #: ``[rows, 1, 1]``; None where all are 1, by which a product leaves every bit as it is.
    scales: torch.Tensor | None


class Tiles:
    """A composition at one layout; what only some ways read is made when it is first asked for."""

    def __init__(self, layout: Layout, wanted: Sequence[Wanted], table: torch.Tensor) -> None:
        self._layout, self._wanted = layout, wanted
        #: ``[rows, total]``, and where it is not 0.
        self.scales = layout.scales(table)
        self.mask = self.scales != 0
        #: ``[rows, adapters]``.
        self.by_entry = layout.by_entry(table)

    def write(self, wanted: Sequence[Wanted], table: torch.Tensor) -> None:
        """Another composition, in the same memory."""
        new = Tiles(self._layout, wanted, table)
        for name in ("scales", "mask", "by_entry"):
            getattr(self, name).copy_(getattr(new, name))
        self._wanted = wanted
        for name in ("pairs", "runs", "used"):
            self.__dict__.pop(name, None)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Adapter by adapter of each row."""
        return [pair for mine in self._each() for pair in mine]

    @cached_property
    def runs(self) -> list[Run]:
        """In the order of each row's adapters: first every row's first, then its second, ..."""
        return _runs(self._each(), self._layout)

    @cached_property
    def used(self) -> list[Span]:
        """The spans of ranks that any row wants, those that touch as one."""
        return _joined(self.pairs)

    def _each(self) -> list[list[Pair]]:
        spans = self._layout.spans
        return [
            [(row, at[0], at[1], scale * at[2]) for entry, scale in mine if (at := spans.get(entry)) is not None]
            for row, mine in enumerate(self._wanted)
        ]


def _joined(pairs: Sequence[Pair]) -> list[Span]:
    found: list[Span] = []
    for first, rank in sorted({(pair[1], pair[2]) for pair in pairs}):
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + rank)
        else:
            found.append((first, rank))
    return found


def _runs(each: Sequence[Sequence[Pair]], layout: Layout) -> list[Run]:
    """As few products as rows that follow each other allow.

    A product of many matrices computes each of them as it does one, so that a run's length is not seen in its rows.
    """
    found: list[list[Pair]] = []
    for level in range(max(map(len, each), default=0)):
        open_run: list[Pair] = []
        for pair in [mine[level] for mine in each if len(mine) > level]:
            if open_run and _goes_on(open_run, pair):
                open_run.append(pair)
            else:
                open_run = [pair]
                found.append(open_run)
    flat = torch.tensor([pair[3] for run in found for pair in run], dtype=torch.float64).to(layout.device, layout.dtype)
    runs, at = [], 0
    for run in found:
        row, first, rank, _ = run[0]
        step = run[1][1] - first if len(run) > 1 else 0
        scales = None if all(pair[3] == 1 for pair in run) else flat[at : at + len(run)].view(-1, 1, 1)
        runs.append(Run(row, len(run), first, step, rank, scales))
        at += len(run)
    return runs


def _goes_on(run: list[Pair], pair: Pair) -> bool:
    row, first, rank, _ = run[-1]
    distance = pair[1] - first
    as_before = len(run) == 1 or distance == first - run[-2][1]
    return pair[0] == row + 1 and pair[2] == rank and distance >= 0 and as_before
