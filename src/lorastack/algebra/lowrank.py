"""Low-rank matrices through their small cores: sum, norm, inner product, SVD, truncation.

``B [out, R] @ A [R, in]`` with ``B = Q_B L_B`` and ``A^T = Q_A L_A`` has the same norm and singular values as
the small ``L_B @ L_A^T``. Two thin factorisations cost R²(in + out); forming the product costs R·in·out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.linalg import LinAlgError

from lorastack.core.delta import LoraDelta, in_type, read_all
from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.core.factor import Factor
from lorastack.core.packed import PackedWeight, Term
from lorastack.errors import ArgumentError, Problems

#: Where R reaches this part of min(in, out), an SVD of the product itself is cheaper (benchmarks/algebra.py).
DENSE_FROM = 0.9
#: Columns nearer to dependence than this (smallest eigenvalue of their normalised Gram matrix) lose too many
#: digits in it: the adapter that is there twice, the lora_B that was never trained.
_INDEPENDENT = 1e-7


class Matrix(NamedTuple):
    """``b @ a`` with ``b [out, R]`` and ``a [R, in]`` in float64, all scales folded into b."""

    b: np.ndarray
    a: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """R, the length of the inner side; the true rank is at most that."""
        return self.b.shape[1]


def matrices(terms: Sequence[Term], names: Sequence[str] = ()) -> list[Matrix]:
    """The weighted sum ``sum of scale * scaling * B @ A`` as matrices: one, or one for each expert.

    An embedding is its table transposed, ``[width, vocabulary]``; a convolution ``[out, in * kernel]``.

    Raises
    ------
    ShapeError
        When the terms do not have one shape.
    NonFiniteError
        Listing every factor that holds NaN or Inf.
    FormatError
        When a float64 factor holds more than float32 does.
    """
    PackedWeight.check(terms, names or [f"adapter {n}" for n in range(len(terms))])
    check_scales(terms, names)
    active = [(scale, delta) for scale, delta in terms if scale * delta.scaling != 0]
    read_all([delta for _, delta in active])
    kept = [_flat(delta, scale * delta.scaling) for scale, delta in active]
    if not kept:
        _, out, n_in = flat_shape(terms[0][1])
        return [Matrix(np.zeros((out, 0)), np.zeros((0, n_in)))] * flat_shape(terms[0][1])[0]
    return [
        Matrix(np.concatenate([part.b for part in parts], 1), np.concatenate([part.a for part in parts]))
        for parts in zip(*kept, strict=True)
    ]


def check_scales(terms: Sequence[Term], names: Sequence[str] = ()) -> None:
    """Refuse scales that float32 does not hold, times the adapter's own scaling: their squares would be infinite.

    Raises
    ------
    ArgumentError
        Listing each.
    """
    problems = Problems("the scales are too large")
    for n, (scale, delta) in enumerate(terms):
        if not abs(scale * delta.scaling) <= FLOAT32_MAX:
            name = names[n] if names else f"adapter {n}"
            problems.add(f"{name}: scale {scale:g} times its scaling {delta.scaling:g} is more than float32 holds")
    problems.raise_any(ArgumentError)


def narrowed(x: np.ndarray) -> np.ndarray:
    """In float32, which has to hold it."""
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise ArgumentError(
            f"the sum has entries of {np.abs(x).max():.3g}, more than float32 holds; give smaller scales"
        )
    return narrow


def flat_shape(delta: LoraDelta) -> tuple[int, int, int]:
    """``(matrices, out, in)`` of an update as `matrices` sees it."""
    a, b = (factor.shape for factor in delta.factors)
    if delta.num_experts:
        return a[0], b[1], a[2]
    return 1, b[0], int(np.prod(a[1:]))


def _flat(delta: LoraDelta, times: float) -> list[Matrix]:
    count, out, n_in = flat_shape(delta)
    for factor in delta.factors:
        in_type(
            factor.array, np.dtype(np.float32), factor.label
        )  # of what float32 holds, squares of products are finite
    a = delta.a.reshape(count, delta.rank, n_in).astype(np.float64)
    b = delta.b.reshape(count, out, delta.rank) * np.float64(times)
    return [Matrix(*pair) for pair in zip(b, a, strict=True)]


def delta_of(parts: Sequence[Matrix], like: LoraDelta, stored: str | None = None) -> LoraDelta:
    """The update, scaling 1, of the kind and shape of ``like``, in float32.

    Ranks are filled up with zeros to the largest. ``stored`` names the type to write it in.
    """
    rank = max([1, *(part.rank for part in parts)])
    _, out, n_in = flat_shape(like)
    a = np.zeros((len(parts), rank, n_in), np.float32)
    b = np.zeros((len(parts), out, rank), np.float32)
    for n, part in enumerate(parts):
        a[n, : part.rank], b[n, :, : part.rank] = narrowed(part.a), narrowed(part.b)
    shape_a, shape_b = (factor.shape for factor in like.factors)
    if not like.num_experts:
        a, b = a.reshape(rank, *shape_a[1:]), b.reshape(out, rank, *shape_b[2:])
    return LoraDelta(_factor(a, "lora_A", stored), _factor(b, "lora_B", stored), 1.0, like.kind)


def _factor(array: np.ndarray, label: str, stored: str | None) -> Factor:
    return Factor(array.shape, array.dtype, lambda: array, label, stored=stored)


class Basis(NamedTuple):
    """A tall ``x [n, R] = Q @ core`` with orthonormal ``Q [n, k]``, of which ``lift(y)`` is ``Q @ y``."""

    core: np.ndarray
    lift: Callable[[np.ndarray], np.ndarray]


def basis(x: np.ndarray) -> Basis:
    """Q through the Cholesky factor of the Gram matrix ``x^T x``, and by QR where columns depend on each other.

    The Gram matrix squares the condition number; in float64, with columns brought to one length, what is
    left for independent columns is more than float32 holds, and Q itself is never formed.
    """
    lengths = np.sqrt(np.einsum("nr,nr->r", x, x))
    if x.shape[1] and x.shape[1] <= x.shape[0] and lengths.all():
        unit = (x.T @ x) / lengths / lengths[:, None]
        if np.linalg.eigvalsh(unit)[0] > _INDEPENDENT:
            try:
                upper = np.linalg.cholesky(unit).T
            except LinAlgError:  # pragma: no cover - the eigenvalue said otherwise
                return _by_qr(x)
            return Basis(upper * lengths, lambda y: x @ (np.linalg.solve(upper, y) / lengths[:, None]))
    return _by_qr(x)


def _by_qr(x: np.ndarray) -> Basis:
    q, r = np.linalg.qr(x)
    return Basis(r, lambda y: q @ y)


class Svd(NamedTuple):
    """Singular values, descending, and the matrix cut after any of them.

    ``rest`` is the sum of the squares of the singular values that are not in ``sigma``.
    """

    sigma: np.ndarray
    vectors: Callable[[int], tuple[np.ndarray, np.ndarray]]
    rest: float = 0.0

    def truncated(self, rank: int) -> Matrix:
        """The best approximation of that rank (Eckart and Young 1936), its singular values shared evenly."""
        u, vt = self.vectors(rank)
        root = np.sqrt(self.sigma[: u.shape[1]])
        return Matrix(u * root, vt * root[:, None])


def svd(matrix: Matrix) -> Svd:
    """The singular value decomposition of ``b @ a``; ``vectors(k)`` gives ``u [out, k]`` and ``vt [k, in]``."""
    if matrix.rank and matrix.rank >= DENSE_FROM * min(matrix.shape):
        u, sigma, vt = np.linalg.svd(matrix.b @ matrix.a, full_matrices=False)
        sigma = sigma[: matrix.rank]  # a product has no more; what lies beyond is rounding
        return Svd(sigma, lambda k: (u[:, :k], vt[:k]))
    if matrix.rank == 0:
        return Svd(np.zeros(0), lambda k: (matrix.b, matrix.a))
    left, right = basis(matrix.b), basis(matrix.a.T)
    u, sigma, vt = np.linalg.svd(left.core @ right.core.T, full_matrices=False)
    return Svd(sigma, lambda k: (left.lift(u[:, :k]), right.lift(vt[:k].T).T))


def inner(x: Matrix, y: Matrix) -> float:
    """``<X, Y> = sum of all X_ij * Y_ij``, the Frobenius inner product, through two R x R matrices."""
    return float(np.sum((x.b.T @ y.b) * (x.a @ y.a.T)))


def norm(matrix: Matrix) -> float:
    """The Frobenius norm, through the core: in ``sqrt(<X, X>)`` parts that cancel would leave noise of 1e-8."""
    if matrix.rank == 0:
        return 0.0
    return float(np.linalg.norm(basis(matrix.b).core @ basis(matrix.a.T).core.T))
