"""Randomised: the leading singular triplets of a matrix that is there whole, without its full decomposition.

The range finder of Halko, Martinsson and Tropp (2011, arXiv:0909.4061, algorithm 4.4): a random sketch a little wider
than the rank, and two power iterations with QR in between. Where the spectrum decays slowly that is not enough for an
error near the best one; so every block of the iteration is kept, as in Musco and Musco (2015, arXiv:1504.05477), and
iterations go on until they no longer find more.
"""

from __future__ import annotations

import numpy as np

from lorastack.algebra.lowrank import Svd

#: Columns of the sketch beyond the rank, and power iterations at least and at most.
OVERSAMPLING, POWERS, MOST_POWERS = 10, 2, 12
#: An iteration that adds less than this part of what is still missing was the last; of all, float32 tells no less.
_SETTLED, _NOISE = 1e-4, 1e-7
#: Numbers of a matrix that are widened to float64 at a time.
_BLOCK = 1 << 18


def leading(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> Svd:
    """The ``rank`` largest singular values of ``matrix [out, in]`` in float32, with their vectors.

    ``rest`` is what the best approximation of that rank leaves: the squared norm of the difference, computed from it.
    A matrix that a sketch would hardly be smaller than is decomposed in full.

    >>> matrix = np.outer(np.arange(1.0, 301), np.ones(200)).astype(np.float32)
    >>> found = leading(matrix, 1, np.random.default_rng(0))
    >>> bool(abs(found.sigma[0] ** 2 / squared_norm(matrix) - 1) < 1e-6)
    True
    """
    width = rank + OVERSAMPLING
    if (POWERS + 1) * width >= min(matrix.shape):
        return whole(matrix, rank)
    total = squared_norm(matrix)
    block = _orthonormal(matrix @ rng.standard_normal((matrix.shape[1], width), np.float32))
    basis, image = block, matrix.T @ block
    found = _captured(image, rank)
    for power in range(1, MOST_POWERS + 1):
        if basis.shape[1] + width > min(matrix.shape) // 2:
            return whole(matrix, rank)
        block = _beside(basis, matrix @ _orthonormal(image[:, -width:]))
        basis = np.concatenate([basis, block], 1)
        image = np.concatenate([image, matrix.T @ block], 1)
        before, found = found, _captured(image, rank)
        if power >= POWERS and found - before <= _SETTLED * max(total - found, 0.0) + _NOISE * total:
            break
    # matrix = basis @ image.T but for what is outside the basis
    right, core = np.linalg.qr(image)
    u, sigma, vt = np.linalg.svd(core.T.astype(np.float64), full_matrices=False)
    left, top = basis @ u[:, :rank].astype(np.float32), vt[:rank].astype(np.float32) @ right.T
    return _svd(matrix, left, sigma[:rank], top)


def whole(matrix: np.ndarray, rank: int) -> Svd:
    """The same by the full decomposition."""
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    # Copies: a slice would keep all of it.
    return _svd(matrix, u[:, :rank].copy(), sigma[:rank].astype(np.float64), vt[:rank].copy())


def squared_norm(matrix: np.ndarray) -> float:
    """The squared Frobenius norm, summed in float64."""
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    blocks = (matrix[n : n + rows].astype(np.float64) for n in range(0, len(matrix), rows))
    return float(sum(np.vdot(block, block) for block in blocks))


def _svd(matrix: np.ndarray, left: np.ndarray, sigma: np.ndarray, right: np.ndarray) -> Svd:
    scaled = left * sigma.astype(np.float32)
    rows = max(1, _BLOCK // matrix.shape[1])
    rest = sum(
        squared_norm(matrix[n : n + rows] - scaled[n : n + rows] @ right) for n in range(0, matrix.shape[0], rows)
    )
    return Svd(sigma, lambda k: (left[:, :k], right[:k]), float(rest))


def _orthonormal(x: np.ndarray) -> np.ndarray:
    return np.linalg.qr(x)[0]


def _beside(basis: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Orthonormal columns for what the block has outside the basis; twice, as the first leaves rounding behind."""
    for _ in range(2):
        block = _orthonormal(block - basis @ (basis.T @ block))
    return block


def _captured(image: np.ndarray, rank: int) -> float:
    """The squared norm that the best ``rank`` directions of the basis hold."""
    wide = image.astype(np.float64)
    return float(np.linalg.eigvalsh(wide.T @ wide)[-rank:].sum())
