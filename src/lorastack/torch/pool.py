"""Pool: memory for the factors of all adapters at one place, which every way to compute reads; they are held once.

``A_all [R, in]`` and ``B_all^T [R, out]`` are row-major, so that an adapter, or a page of the kernels, is a slice of
both, and no rank is padded. A pushed adapter fills ranks that are free, a removed one frees its own, and nothing moves,
until there is no room and all is copied to more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

#: Ranks that the kernels take at a time; an adapter's last page has the rest.
PAGE = 16

#: (first rank, ranks).
Span = tuple[int, int]


class _Gone(list[tuple[int, torch.Tensor, torch.Tensor]]):
    """What was freed since `Pool.state`: where it lay, and the factors; a list that may be referred to weakly."""


class Pool:
    """``a [R, in, ...]`` and ``b [R, out, ...]``, the ranks that are nobody's included, which are 0."""

    def __init__(self) -> None:
        self.a = torch.empty(0)
        self.b = torch.empty(0)
        #: The same with room for more.
        self._a: torch.Tensor | None = None
        self._b: torch.Tensor | None = None
        # Only as long as somebody holds a state: no factors are kept that nobody can ask for.
        self._gone: weakref.ref[_Gone] | None = None

    def put(self, a: torch.Tensor, b: torch.Tensor, held: Iterable[Span], coming: int) -> int:
        """Hold these factors too; returns their first rank.

        Parameters
        ----------
        a, b
            ``[rank, in, ...]`` and ``[rank, out, ...]``.
        held
            The spans that are somebody's.
        coming
            Ranks that come with these at once, theirs included: memory is made for exactly so many.
        """
        held, rank = sorted(held), len(a)
        first = _free(held, rank)
        if self._a is None and coming == rank:
            # A lone adapter's A stays where it is, perhaps in the adapter's own memory: it is never written to.
            self._a, self._b = a.contiguous(), b.contiguous()
        else:
            end = sum(held[-1]) if held else 0
            self._make_room(a, b, end, max(first + rank, end + coming * (coming > rank)), coming > rank)
            assert self._a is not None
            assert self._b is not None
            self._a[first : first + rank] = a
            self._b[first : first + rank] = b
        self.show([*held, (first, rank)])
        return first

    def free(self, span: Span, held: Iterable[Span]) -> None:
        """Let go of a span; others are held still."""
        assert self._a is not None
        assert self._b is not None
        first, end = span[0], span[0] + span[1]
        gone = self._gone() if self._gone else None
        if gone is not None:
            gone.append((first, self._a[first:end].clone(), self._b[first:end].clone()))
        self._clear(first, end)
        self.show(held)

    def show(self, held: Iterable[Span]) -> None:
        """Have ``a`` and ``b`` end with the last rank that is somebody's."""
        assert self._a is not None
        assert self._b is not None
        end = max(first + rank for first, rank in held)
        self.a, self.b = self._a[:end], self._b[:end]

    def state(self) -> Any:
        """What `restore` brings back."""
        gone = _Gone()
        self._gone = weakref.ref(gone)
        return self._a, self._b, gone

    def restore(self, state: Any, held: Iterable[Span]) -> None:
        """Be as `state` found it, when these spans were held."""
        self._a, self._b, gone = state
        held = sorted(held)
        if self._a is None or self._b is None or not held:
            return
        for first, a, b in gone:
            self._a[first : first + len(a)] = a
            self._b[first : first + len(b)] = b
        end = 0
        for first, rank in held:  # something may have been put between them
            if first > end:
                self._clear(end, first)
            end = first + rank
        self.show(held)

    def _clear(self, first: int, end: int) -> None:
        """A factor that nobody has is 0: it is multiplied by 0 and added, and an old one may be NaN, or become Inf."""
        assert self._a is not None
        assert self._b is not None
        self._a[first:end] = 0
        self._b[first:end] = 0

    def _make_room(self, a: torch.Tensor, b: torch.Tensor, used: int, need: int, exactly: bool) -> None:
        there = 0 if self._a is None else len(self._a)
        if need <= there:
            return
        room = need if exactly else max(need, 2 * used)  # since a copy of all is made each time
        with torch.inference_mode(False):  # or nothing could be written to it elsewhere
            grown_a, grown_b = a.new_empty((room, *a.shape[1:])), b.new_empty((room, *b.shape[1:]))
        if self._a is not None and self._b is not None:
            grown_a[:used] = self._a[:used]
            grown_b[:used] = self._b[:used]
        self._a, self._b = grown_a, grown_b

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room for more."""
        return sum(t.numel() * t.element_size() for t in (self._a, self._b) if t is not None)


def _free(held: Iterable[Span], rank: int) -> int:
    """The first of so many free ranks in a row; behind all others when there are none between them.

    >>> _free([(0, 4), (9, 3)], 5), _free([(0, 4), (9, 3)], 6), _free([], 2)
    (4, 12, 0)
    """
    end = 0
    for first, ranks in held:
        if first - end >= rank:
            break
        end = first + ranks
    return end
