"""Compare: what adapters do, and how they get on with each other, from their factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorastack.algebra.entries import Entry, entries_of, fitted, weights_of
from lorastack.algebra.intruders import IntruderSearch
from lorastack.algebra.lowrank import flat_shape
from lorastack.algebra.measure import AdapterMeasure, WeightMeasure, measure_adapter
from lorastack.algebra.pairs import FEW, NUMBERS, Pairs, Sums, independent_pileup, pairs_of, plain, stacked
from lorastack.algebra.share import Measured, Runner, Share
from lorastack.algebra.span import principal_angles
from lorastack.base import BaseModel, open_base
from lorastack.core.adapter import LoadedLora
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, Failures

__all__ = ["Comparison", "IntruderSearch", "NearDuplicate", "Pairs", "compare", "principal_angles", "verdict"]

#: About how many entries of a weight the signs are compared at, where looking at all would take long.
SIGN_SAMPLES = 1 << 16
#: All entries are looked at while there are no more than these, of all adapters and weights together: seconds.
SIGNS_EXACT_TO = 1 << 28
#: Above this cosine two adapters do nearly the same.
DUPLICATE = 0.99
#: The paper's own: the ten leading vectors, cosines below one half.
INTRUDERS = IntruderSearch()
#: Beyond this cosine it matters for the sum that both are there.
MATTERS = 0.1


class NearDuplicate(NamedTuple):
    """Two adapters that do nearly the same; ``ratio`` is the norm of the second over that of the first."""

    first: str
    second: str
    cosine: float
    ratio: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison(Pairs):
    """What `compare` found: every adapter by itself, and every pair over all weights.

    Attributes
    ----------
    adapters
        One measure for each entry of the stack, in order; the rows and columns of all arrays.
    weights
        Every weight that some adapter changes, in the stack's order.
    by_weight
        The same numbers for each weight, in the order of ``weights``; None for more than 32 adapters.
    norm, total_pileup
        The norm of the sum of all, and that over the sum of their norms (NaN when all are zero).
    near_duplicates
        Pairs whose cosine is above 0.99.
    signs_exact, sign_entries
        Whether every entry's sign was compared; how many entries (of each adapter) were.
    """

    adapters: tuple[AdapterMeasure, ...]
    weights: tuple[str, ...]
    by_weight: Pairs | None
    norm: float
    total_pileup: float
    near_duplicates: tuple[NearDuplicate, ...]
    signs_exact: bool
    sign_entries: int

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, each once."""
        return tuple(one.name for one in self.adapters)

    @property
    def independent_pileup(self) -> float:
        """What ``total_pileup`` would be of adapters of these norms that have nothing to do with each other."""
        return independent_pileup(one.norm for one in self.adapters)

    def to_dict(self, by_weight: bool = False) -> dict[str, Any]:
        """Plain types, for JSON: adapters and pairs; with ``by_weight`` the numbers of pairs by weight too."""
        names = self.names
        pairs = []
        for i in range(len(names)):
            for j in range(i + 1, len(names)):
                one: dict[str, Any] = {"first": names[i], "second": names[j], **self.pair(i, j)}
                one["verdict"] = verdict(float(self.cosine[i, j]))
                if by_weight and self.by_weight is not None:
                    one["by_weight"] = self.by_weight.pair(i, j)
                pairs.append(one)
        return {
            "adapters": [one.to_dict() for one in self.adapters],
            "weights": list(self.weights),
            "pairs": pairs,
            "norm": self.norm,
            "total_pileup": plain(self.total_pileup),
            "independent_pileup": plain(self.independent_pileup),
            "near_duplicates": [one._asdict() for one in self.near_duplicates],
            "signs_exact": self.signs_exact,
            "sign_entries": self.sign_entries,
        }


def verdict(cosine: float) -> str:
    """A word for two adapters that are added: ``cancel``, ``independent`` or ``pile up``.

    >>> verdict(-0.4), verdict(0.02), verdict(0.4), verdict(float("nan"))
    ('cancel', 'independent', 'pile up', 'no effect')
    """
    if math.isnan(cosine):
        return "no effect"
    return "independent" if abs(cosine) < MATTERS else "pile up" if cosine > 0 else "cancel"


def compare(
    stack: LoraStack,
    base: BaseModel | str | Path | None = None,
    names: Sequence[str] | None = None,
    *,
    intruders: IntruderSearch | None = INTRUDERS,
    sign_samples: int | None = SIGN_SAMPLES,
    allow_mixed_bases: bool = False,
    progress: Callable[[int], None] | None = None,
    run: Runner | None = None,
) -> Comparison:
    """Measure every adapter of a stack, at its scale, and every pair of them.

    Only low-rank updates are measured; what else an adapter holds is named in its measure's ``left_out``.

    Parameters
    ----------
    stack
        At least one adapter. Those known by (target module, layer) need the base, which has their weights' names.
    base
        The model they are for, or where it is: norms are then also given relative to its weights, and intruder
        dimensions are looked for.
    names
        The adapters' names in the result; the stack's own when not given.
    intruders
        How to look for intruder dimensions; None to leave them, and so the decomposition of every weight of the base,
        which takes from seconds to minutes each the first time.
    sign_samples
        About how many entries of each weight to compare signs at, where there are too many to look at all; None
        for all of them whatever it takes.
    progress
        Called with 1 after each weight of ``stack.weights``.
    run
        Who measures the weights: `lorastack.fleet.workers` has processes and Ray's tasks; this process when not given.

    Raises
    ------
    ArgumentError
        When the stack is empty, or ``names`` are not as many as its adapters.
    ShapeError, NonFiniteError
        Listing every weight that adapters disagree on, every factor that holds NaN or Inf.
    NamingError
        Listing every weight that has no place in the base.

    Examples
    --------
    >>> import numpy as np
    >>> from lorastack import LoadedLora
    >>> b, a = np.ones((2, 1)), np.array([[3.0, 4.0, 0.0]])
    >>> one = LoadedLora.from_tensors({"w": (a, b)}, name="one")
    >>> two = LoadedLora.from_tensors({"w": (a[:, ::-1], b)}, name="two")
    >>> found = compare(LoraStack([(one, 1.0), (two, -1.0)]))
    >>> f"{found.adapters[0].norm:.3f}", f"{found.cosine[0, 1]:.2f}", verdict(found.cosine[0, 1])
    ('7.071', '-0.64', 'cancel')
    """
    base = base if isinstance(base, BaseModel) or base is None else open_base(base)
    entries = _renamed(entries_of(stack, base, "compare", allow_mixed_bases), names)
    entries = entries if base is None else fitted(entries, base)
    weights = weights_of(entries, "compared")
    if not weights:
        raise ArgumentError("the adapters have no low-rank updates, so there is nothing to compare")
    total = sum(math.prod(flat_shape(next(iter(at.values())))) for at in weights.values())
    exact = sign_samples is None or total * len(entries) <= SIGNS_EXACT_TO
    totals = Sums.zeros(len(entries))
    of_each: list[Pairs] = []
    measured: list[list[WeightMeasure]] = [[] for _ in entries]
    base_squares = np.zeros(len(entries))
    failures = Failures("the adapters cannot be compared")
    looked = 0
    shares = (
        Share.of(
            number, weight, entries, at, sign_samples=None if exact else sign_samples, base=base, intruders=intruders
        )
        for number, (weight, at) in enumerate(weights.items())
    )
    # After a first problem the rest is only read, so that one error lists them all.
    here = (share.measured(only_read=bool(failures)) for share in shares)
    for one in _in_order(here if run is None else run(shares), progress):
        failures.errors += one.errors
        if one.sums is None or failures:
            continue
        base_squares[list(one.measures)] += one.base_square
        for n, measure in one.measures.items():
            measured[n].append(measure)
        looked += one.looked
        totals.add(one.sums)
        if len(entries) <= FEW:
            of_each.append(pairs_of(one.sums))
    failures.raise_any()
    adapters = tuple(
        measure_adapter(
            one.name, one.scale, measured[n], None if base is None else math.sqrt(base_squares[n]), _left_out(one.lora)
        )
        for n, one in enumerate(entries)
    )
    overall = pairs_of(totals)
    lengths = np.sqrt(totals.inner.diagonal())
    norm = math.sqrt(max(0.0, float(totals.inner.sum())))
    return Comparison(
        **{name: getattr(overall, name) for name in NUMBERS},
        adapters=adapters,
        weights=tuple(weights),
        by_weight=stacked(of_each) if len(entries) <= FEW else None,
        norm=norm,
        total_pileup=norm / float(lengths.sum()) if lengths.any() else math.nan,
        near_duplicates=_near_duplicates([one.name for one in entries], overall.cosine, lengths),
        signs_exact=looked == total,
        sign_entries=looked,
    )


def _renamed(entries: list[Entry], names: Sequence[str] | None) -> list[Entry]:
    if names is None:
        return entries
    if len(names) != len(entries) or len(set(names)) != len(names):
        raise ArgumentError(f"names are {list(names)}; give {len(entries)}, each once, one for each adapter")
    return [one._replace(name=name) for one, name in zip(entries, names, strict=True)]


def _in_order(found: Iterator[Measured], progress: Callable[[int], None] | None) -> Iterator[Measured]:
    """By number, whatever order they come in: sums are then the same to the bit."""
    early: dict[int, Measured] = {}
    wanted = 0
    for one in found:
        if progress is not None:
            progress(1)
        early[one.number] = one
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def _near_duplicates(names: Sequence[str], cosine: np.ndarray, norms: np.ndarray) -> tuple[NearDuplicate, ...]:
    with np.errstate(invalid="ignore"):
        found = np.argwhere(np.triu(cosine > DUPLICATE, 1))
    return tuple(NearDuplicate(names[i], names[j], float(cosine[i, j]), float(norms[j] / norms[i])) for i, j in found)


def _left_out(lora: LoadedLora) -> list[str]:
    return [f"{len(values)} {kind}: {KINDS[kind]}" for kind, values in lora.extras.items() if kind not in HARMLESS]
