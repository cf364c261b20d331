"""Where updates of one weight disagree in sign: tile by tile, or over a seeded sample of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorastack.algebra.lowrank import Matrix

#: Entries of all updates together that one tile holds: 4 MiB of float64.
_TILE = 1 << 19
_TILE_COLUMNS = 2048


class SignCounts(NamedTuple):
    """For each pair how many entries differ in sign and how many both change, ``[N, N]``; entries looked at."""

    differ: np.ndarray
    both: np.ndarray
    looked: int


def sign_counts(parts: Sequence[Matrix | None], samples: int | None, seed: Sequence[int] = (0,)) -> SignCounts:
    """Count the signs of ``b @ a`` of every pair of updates of one weight.

    Parameters
    ----------
    parts
        One update of one shape for each adapter, None for an adapter without any; at least one is there.
    samples
        About how many entries to look at: as many random rows as columns, seeded, the counts then scaled to the
        whole; None, or no fewer than the weight has, for every entry.
    seed
        Of the sample.
    """
    out, n_in = next(part.shape for part in parts if part is not None)
    rows, columns = np.arange(out), np.arange(n_in)
    if samples is not None and samples < out * n_in:
        rng = np.random.default_rng(list(seed))
        wide = min(n_in, max(1, samples // min(out, int(np.sqrt(samples)))))
        rows = np.sort(rng.choice(out, min(out, max(1, samples // wide)), replace=False))
        columns = np.sort(rng.choice(n_in, wide, replace=False))
    looked = len(rows) * len(columns)
    count = len(parts)
    agree, both = np.zeros((count, count)), np.zeros((count, count))
    width = min(len(columns), _TILE_COLUMNS)
    height = max(1, _TILE // (count * width))
    for top in range(0, len(rows), height):
        for left in range(0, len(columns), width):
            signs = _signs(parts, rows[top : top + height], columns[left : left + width])
            # Of -1, 0 and 1 a product counts: agreements less disagreements, and of their sizes, entries both change.
            # Sums of at most _TILE ones are exact in float32.
            agree += signs @ signs.T
            size = np.abs(signs)
            both += size @ size.T
    whole = out * n_in / looked
    return SignCounts((both - agree) / 2 * whole, both * whole, looked)


def _signs(parts: Sequence[Matrix | None], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    signs = np.zeros((len(parts), len(rows) * len(columns)), np.float32)
    for n, part in enumerate(parts):
        if part is not None and part.rank:
            signs[n] = np.sign(part.b[rows] @ part.a[:, columns]).reshape(-1)
    return signs
