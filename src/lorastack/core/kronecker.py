"""Kronecker: an update ``scaling * kron(w1, w2)`` of two full factors, as LoKr has it; never formed but row by row."""

from __future__ import annotations

import math

import numpy as np

from lorastack.core.delta import Kind, LoraDelta
from lorastack.core.factor import Factor
from lorastack.errors import ShapeError


class Kronecker:
    """``scaling * kron(w1, w2)``: ``w1 [a, b]``, ``w2 [c, d, *kernel]``, the update is ``[a * c, b * d, *kernel]``.

    (Yeh et al. 2023, arXiv:2309.14859.)

    Raises
    ------
    ShapeError
        When the factors have other dimensions.

    Examples
    --------
    >>> import numpy as np
    >>> one = Kronecker(Factor.of(np.eye(2), "w1"), Factor.of(np.ones((1, 3)), "w2"))
    >>> one.shape, one.rows(1, 2).tolist()
    ((2, 6), [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    """

    __slots__ = ("scaling", "w1", "w2")

    def __init__(self, w1: Factor, w2: Factor, scaling: float = 1.0) -> None:
        if len(w1.shape) != 2 or len(w2.shape) not in (2, 3, 4, 5) or 0 in w1.shape + w2.shape:
            raise ShapeError(f"lokr_w1 is {w1.shape} and lokr_w2 is {w2.shape}: they are no factors of a weight")
        self.w1, self.w2, self.scaling = w1, w2, scaling

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        (a, b), (c, d, *kernel) = self.w1.shape, self.w2.shape
        return (a * c, b * d, *kernel)

    def rows(self, first: int, stop: int, dtype: type = np.float32) -> np.ndarray:
        """Rows ``first`` to ``stop`` of the update, ``[stop - first, columns]``, a kernel's positions side by side."""
        w1, w2 = self._arrays(np.dtype(dtype))
        over, under = np.divmod(np.arange(first, stop), w2.shape[0])
        product = w1[over][:, :, None] * w2[under][:, None, :]
        return (product * dtype(self.scaling)).reshape(stop - first, -1)

    def best(self, rank: int) -> tuple[LoraDelta, float]:
        """The nearest update of that rank, and its relative error in the Frobenius norm, which is exact.

        The singular values of a Kronecker product are the products of those of its factors, and its singular vectors
        the Kronecker products of theirs (Van Loan 2000, The ubiquitous Kronecker product).
        """
        w1, w2 = self._arrays(np.dtype(np.float64))
        (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(w, full_matrices=False) for w in (w1, w2))
        every = np.multiply.outer(s1, s2).reshape(-1)
        taken = np.argsort(-every, kind="stable")[:rank]
        one, two = np.divmod(taken, len(s2))
        root = np.sqrt(every[taken])
        b = (u1[:, None, one] * u2[None, :, two]).reshape(-1, len(taken)) * root
        a = (v1[one][:, :, None] * v2[two][:, None, :]).reshape(len(taken), -1) * root[:, None]
        total = float(np.sum(every**2))
        lost = float(np.sum(np.delete(every, taken) ** 2))
        kernel = self.shape[2:]
        if kernel:
            a, b = a.reshape(len(taken), -1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        kind: Kind = "conv" if kernel else "linear"
        delta = LoraDelta(a.astype(np.float32), b.astype(np.float32), self.scaling, kind)
        return delta, math.sqrt(lost / total) if total else 0.0

    def _arrays(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        w2 = self.w2.take().astype(dtype)
        return self.w1.take().astype(dtype), w2.reshape(w2.shape[0], -1)

    def __reduce__(self) -> tuple[type[Kronecker], tuple[Factor, Factor, float]]:
        return Kronecker, (self.w1, self.w2, self.scaling)

    def __repr__(self) -> str:
        return f"Kronecker({self.w1.shape} x {self.w2.shape}, scaling={self.scaling:g})"
