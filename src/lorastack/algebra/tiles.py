"""Tiled: a large matrix that exists a block of rows at a time, and its truncated SVD in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lorastack.algebra.lowrank import Svd

#: Entries of a block of rows; with a handful of temporaries some tens of megabytes.
TILE = 1 << 19
_OVERSAMPLED = 10
_MOST_PASSES = 10
_SETTLED = 1e-7


class Tiled:
    """A matrix ``[out, in]`` given by a function that makes its blocks of rows, in order, as often as asked."""

    def __init__(self, shape: tuple[int, int], blocks: Callable[[], Iterator[tuple[slice, np.ndarray]]]) -> None:
        self.shape = shape
        self.blocks = blocks


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of each block; they depend on the shape alone, so that random masks are the same every time."""
    step = max(1, TILE // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def truncated_svd(matrix: Tiled, rank: int, seed: int = 0) -> Svd:
    """The leading singular values by randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061).

    Each pass makes every block once. ``rest`` is exact whatever the iteration found: the norm of the whole
    less that of its projection.
    """
    out, n_in = matrix.shape
    k = min(rank + _OVERSAMPLED, out, n_in)
    v = np.linalg.qr(np.random.default_rng(seed).standard_normal((n_in, k)))[0]
    found = 0.0
    for _ in range(_MOST_PASSES if k < n_in else 0):
        z = np.zeros((n_in, k))
        for _, block in matrix.blocks():
            wide = block.astype(np.float64)
            z += wide.T @ (wide @ v)
        before, found = found, float(np.einsum("nk,nk->", v, z))
        v = np.linalg.qr(z)[0]
        if found <= before * (1 + _SETTLED) or k == out:
            break
    projected, total = np.empty((out, k)), 0.0
    for rows, block in matrix.blocks():
        wide = block.astype(np.float64)
        projected[rows] = wide @ v
        total += float(np.einsum("nk,nk->", wide, wide))
    u, sigma, vt = np.linalg.svd(projected, full_matrices=False)
    vt = vt @ v.T
    # Products of thousands of terms leave a rounding of about this size where nothing is left.
    rest = total - float(sigma @ sigma)
    return Svd(sigma, lambda r: (u[:, :r], vt[:r]), rest if rest > 1e-13 * total else 0.0)
