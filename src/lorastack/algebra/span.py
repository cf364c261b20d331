"""Span: an update at one weight by its singular vectors, without what is numerically zero, and principal angles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorastack.algebra.lowrank import Matrix, svd
from lorastack.errors import NonFiniteError, ShapeError

#: Singular values below this part of the largest count as zero: factors in float32 are no more exact than that.
RANK_TOLERANCE = 1e-6


class Span(NamedTuple):
    """``u diag(sigma) v^T``: ``u [out, k]`` and ``v [in, k]`` orthonormal, ``sigma [k]`` descending, k the true rank.

    The columns of u span the column space (what the update can write), those of v the row space (what it reads).
    """

    u: np.ndarray
    sigma: np.ndarray
    v: np.ndarray

    @property
    def rank(self) -> int:
        """The numerical rank k: 0 for an update that changes nothing, less than R where columns repeat."""
        return len(self.sigma)


def span(matrix: Matrix) -> Span:
    """The singular vectors of ``b @ a``, in float64, through the small core: O(R²(in + out)).

    Raises
    ------
    NonFiniteError
        When a factor holds NaN or Inf that was let in, or overflows with its scale.
    """
    # The sum is NaN or Inf exactly when a value is, or when it overflows, and then no singular value is finite.
    if not np.isfinite(matrix.a.sum()) or not np.isfinite(matrix.b.sum()):
        raise NonFiniteError("the factors times their scale hold NaN or Inf, which have no norm and no angle")
    found = svd(matrix)
    if not found.sigma.size or not found.sigma[0] > 0:
        out, n_in = matrix.shape
        return Span(np.zeros((out, 0)), np.zeros(0), np.zeros((n_in, 0)))
    rank = int(np.count_nonzero(found.sigma > RANK_TOLERANCE * found.sigma[0]))
    u, vt = found.vectors(rank)
    return Span(u, found.sigma[:rank], vt.T)


def principal_angles(x: Matrix, y: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Angles between the row spaces and between the column spaces of two updates of one weight.

    Parameters
    ----------
    x, y
        Updates of one shape, as `matrices` gives them.

    Returns
    -------
    tuple
        ``(row_angles, column_angles)`` in radians, ascending, ``min(rank x, rank y)`` each: 0 is a direction that
        both have, π/2 one that the other lacks. Small angles through the sine (Björck and Golub 1973,
        doi:10.1090/S0025-5718-1973-0348991-3), where the cosine would lose half the digits.

    Raises
    ------
    ShapeError
        When the shapes differ.

    Examples
    --------
    >>> b, a = np.eye(4)[:, :2], np.eye(5)[:2]
    >>> rows, columns = principal_angles(Matrix(b, a), Matrix(b, np.eye(5)[1:3]))
    >>> [f"{angle:.2f}" for angle in rows], [f"{angle:.2f}" for angle in columns]
    (['0.00', '1.57'], ['0.00', '0.00'])
    """
    if x.shape != y.shape:
        raise ShapeError(f"updates of one weight have one shape, these are {list(x.shape)} and {list(y.shape)}")
    one, two = span(x), span(y)
    return _angles(one.v, two.v), _angles(one.u, two.u)


def _angles(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    if p.shape[1] < q.shape[1]:
        p, q = q, p
    if q.shape[1] == 0:
        return np.zeros(0)
    shared = p.T @ q
    cosines = np.clip(np.linalg.svd(shared, compute_uv=False), 0, 1)
    sines = np.clip(np.linalg.svd(q - p @ shared, compute_uv=False)[::-1], 0, 1)
    return np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines))
