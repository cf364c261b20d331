"""Pool: the factors of one layer's adapters in pages of 16 ranks, which every way to compute rows shares.

A pushed adapter fills free pages, a removed one frees its own, and nothing moves, so that what another plan or a
captured graph reads stays where it is. An adapter's pages follow each other. What lies behind its last rank is 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lorastack.torch.prepared import Slot

#: Ranks of a page.
PAGE = 16


class Pool:
    """``a [pages, 16, in]`` and ``b [pages, 16, out]``; which pages are whose, by the adapters' keys.

    Parameters
    ----------
    n_in, n_out
        Of the layer.
    dtype
        The type that products are computed in.
    """

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device) -> None:
        self.a = torch.zeros((0, PAGE, n_in), dtype=dtype, device=device)
        self.b = torch.zeros((0, PAGE, n_out), dtype=dtype, device=device)
        self._held: dict[int, range] = {}
        self._flatten()

    def first_page(self, key: int) -> int:
        """Where an adapter's pages begin."""
        return self._held[key].start

    @property
    def used(self) -> int:
        """Pages up to the last one that is anybody's."""
        return max((pages.stop for pages in self._held.values()), default=0)

    def keep(self, slots: Iterable[Slot], a: torch.Tensor, b: torch.Tensor) -> None:
        """Hold these adapters and no others; ``a [R, in]`` and ``b [out, R]`` are theirs side by side."""
        slots = list(slots)
        wanted = {slot.key for slot in slots}
        for key in [key for key in self._held if key not in wanted]:
            pages = self._held.pop(key)
            self.b[pages.start : pages.stop] = 0  # a factor that nobody has may not be NaN: 0 times it is added
            self.a[pages.start : pages.stop] = 0
        at = 0
        new = []
        for slot in slots:
            if slot.key not in self._held:
                new.append((slot, at))
            at += slot.rank
        for slot, _ in new:
            self._held[slot.key] = self._free(-(-slot.rank // PAGE))
        self._make_room()
        for slot, at in new:
            pages = self._held[slot.key]
            first = pages.start * PAGE
            self.ranks_a[first : first + slot.rank] = a[at : at + slot.rank]
            self.ranks_b[first : first + slot.rank] = b[:, at : at + slot.rank].t()

    def _free(self, count: int) -> range:
        """The first free pages, that many in a row; beyond what there is when there are none."""
        at = 0
        for pages in sorted(self._held.values(), key=lambda held: held.start):
            if pages.start - at >= count:
                break
            at = pages.stop
        return range(at, at + count)

    def _make_room(self) -> None:
        """Memory for all pages that are somebody's, with room for more, since a copy of all is made each time."""
        there, need = self.a.shape[0], self.used
        if need <= there:
            return
        need = max(need, there + there // 2)
        for name in ("a", "b"):
            old = getattr(self, name)
            grown = old.new_zeros((need, *old.shape[1:]))
            grown[:there] = old
            setattr(self, name, grown)
        self._flatten()

    def _flatten(self) -> None:
        #: The same memory as one matrix each, ``[ranks, in]`` and ``[ranks, out]``.
        self.ranks_a, self.ranks_b = self.a.view(-1, self.a.shape[2]), self.b.view(-1, self.b.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return sum(t.numel() * t.element_size() for t in (self.a, self.b))
