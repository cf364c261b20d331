"""Rules that combine several updates entry by entry, in whatever space their entries are taken.

Each takes ``parts``, arrays of one shape whose weights are multiplied in, and gives one array of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

#: Every part's entries, a chunk at a time: ``(which part, its entries)``, as often as asked.
Chunks = Callable[[], Iterable[tuple[int, np.ndarray]]]


def total(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The plain sum, the last step of `magnitude_prune` and DARE."""
    whole = parts[0].copy()
    for part in parts[1:]:
        whole += part
    return whole


def elect_and_average(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The last two steps of TIES (Yadav et al. 2023, arXiv:2306.01708): elect a sign, average what has it.

    The sign with the larger total magnitude wins an entry; the mean is over the parts with that sign
    that are not zero there. Where both totals are equal the entry is 0.
    """
    elected = np.sign(total(parts))
    merged = np.zeros_like(elected)
    count = np.zeros_like(elected)
    for part in parts:
        agrees = np.sign(part) * elected > 0
        merged += np.where(agrees, part, 0)
        count += agrees
    return merged / np.maximum(count, 1)


def trim(part: np.ndarray, threshold: float) -> np.ndarray:
    """Zero where the magnitude is below ``threshold``: the first step of TIES, and of magnitude pruning."""
    return np.where(np.abs(part) >= threshold, part, np.float32(0))


def drop(part: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """Keep each entry with probability ``density``, divided by it (DARE, Yu et al. 2023, arXiv:2311.03099).

    The paper's drop rate p is ``1 - density``.
    """
    kept = random.random(part.shape, dtype=np.float32) < density
    return np.where(kept, part / np.float32(density), np.float32(0))


def thresholds(chunks: Chunks, parts: int, density: float) -> list[float]:
    """For each part the magnitude of which ``density`` of all its entries are at least as large, exactly.

    Magnitudes of float32 are ordered as their bits are: one pass counts the upper 16 bits, a second the
    lower ones within the bin that holds the threshold. Memory does not grow with the entries.
    """
    upper = np.zeros((parts, 1 << 15), np.int64)
    for part, entries in chunks():
        upper[part] += np.bincount(_bits(entries) >> 16, minlength=1 << 15)
    keep = [max(1, round(density * int(counts.sum()))) for counts in upper]
    # A part without entries (an untrained adapter has no directions) has nothing to trim: any threshold will do.
    upper[upper.sum(1) == 0, 0] = 1
    bins = [_bin_of(counts, n) for counts, n in zip(upper, keep, strict=True)]
    lower = np.zeros((parts, 1 << 16), np.int64)
    for part, entries in chunks():
        bits = _bits(entries)
        lower[part] += np.bincount(bits[bits >> 16 == bins[part][0]] & 0xFFFF, minlength=1 << 16)
    found = []
    lower[lower.sum(1) == 0, 0] = 1
    for (top, above), counts, n in zip(bins, lower, keep, strict=True):
        low, _ = _bin_of(counts, n - above)
        found.append(float(np.uint32(top << 16 | low).view(np.float32)))
    return found


def _bits(entries: np.ndarray) -> np.ndarray:
    return np.abs(np.ascontiguousarray(entries, np.float32)).reshape(-1).view(np.uint32).astype(np.int64)


def _bin_of(counts: np.ndarray, n: int) -> tuple[int, int]:
    """The bin that holds the n-th largest, and how many lie above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, n))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0
