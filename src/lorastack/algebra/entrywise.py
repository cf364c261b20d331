"""ByEntry: a rule (see `rules`) applied in a space (see `spaces`) to all weights of a stack."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lorastack.algebra import rules
from lorastack.algebra.combine import EXACT, cut_off
from lorastack.algebra.cut import Cut, Loss
from lorastack.algebra.lowrank import Svd, matrices, svd
from lorastack.algebra.method import Method
from lorastack.algebra.spaces import SPACES, Coordinates
from lorastack.algebra.tiles import Tiled, truncated_svd
from lorastack.core.delta import LoraDelta
from lorastack.core.packed import Term


class ByEntry:
    """A rule in a space, over all weights of a stack: trimming has one threshold for an adapter's whole update.

    Parameters
    ----------
    weights
        Weight name -> its terms, with the number of the adapter each comes from.
    step
        Called once for each weight and pass.
    """

    def __init__(
        self,
        weights: Mapping[str, Sequence[tuple[int, Term]]],
        method: Method,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.weights = weights
        self.method = method
        self.step = step
        self.density = method.density or 1.0
        self._thresholds: list[float] = []
        if method.rule in ("ties", "magnitude_prune") and self.density < 1:
            adapters = 1 + max((n for terms in weights.values() for n, _ in terms), default=0)
            self._thresholds = rules.thresholds(self._chunks, adapters, self.density)

    def combined(self, weight: str, cut: Cut | None) -> tuple[LoraDelta, Loss]:
        """The combination at one weight, cut; dense ones to the adapters' ranks together without a cut."""
        numbered = self.weights[weight]
        terms = [term for _, term in numbered]
        if cut is None and self.method.space == "dense":
            cut = Cut((sum(delta.rank for _, delta in terms),))
        parts = []
        for expert, place in enumerate(self._places(terms)):
            parts.append(self._svd(weight, expert, place, [n for n, _ in numbered], terms, cut or EXACT))
        self.step()
        return cut_off(parts, cut or EXACT, terms)

    def _svd(
        self, weight: str, expert: int, place: Coordinates, adapters: list[int], terms: Sequence[Term], cut: Cut
    ) -> Svd:
        def merged() -> Iterator[tuple[slice, np.ndarray]]:
            for rows, parts in place.blocks():
                key = (self.method.seed, zlib.crc32(weight.encode()), expert, rows.start)
                yield rows, self._rule(parts, adapters, key)

        if place.back is None:
            # With a tolerance the ranks up to the adapters' together are looked at.
            most = cut.ranks[-1] if cut.ranks else sum(delta.rank for _, delta in terms)
            return truncated_svd(Tiled(place.shape, merged), most, self.method.seed)
        for _, whole in merged():
            return svd(place.back(whole))
        raise AssertionError("coordinates have at least one block")  # pragma: no cover

    def _rule(self, parts: list[np.ndarray], adapters: list[int], key: tuple[int, ...]) -> np.ndarray:
        if self.method.rule in ("dare", "dare_ties"):
            randoms = [np.random.default_rng((*key, n)) for n in adapters]
            parts = [rules.drop(part, self.density, r) for part, r in zip(parts, randoms, strict=True)]
        elif self._thresholds:
            parts = [rules.trim(part, self._thresholds[n]) for part, n in zip(parts, adapters, strict=True)]
        merge = rules.elect_and_average if self.method.rule in ("ties", "dare_ties") else rules.total
        return merge(parts)

    def _places(self, terms: Sequence[Term]) -> list[Coordinates]:
        updates = [matrices([term]) for term in terms]
        return [SPACES[self.method.space](parts) for parts in zip(*updates, strict=True)]

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for numbered in self.weights.values():
            for place in self._places([term for _, term in numbered]):
                for _, parts in place.blocks():
                    yield from zip([n for n, _ in numbered], parts, strict=True)
            self.step()
