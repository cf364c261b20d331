"""Random adapters of every kind, and the dense updates that they stand for."""

from __future__ import annotations

import numpy as np

from lorastack import LoadedLora, LoraDelta
from lorastack.core.delta import Kind

#: kind -> shapes of A and B but for the rank, which stands where the r is.
SHAPES: dict[str, tuple[tuple, tuple]] = {
    "linear": (("r", 7), (9, "r")),
    "embedding": (("r", 11), (6, "r")),
    "experts": ((3, "r", 5), (3, 8, "r")),
    "conv": (("r", 2, 3, 3), (5, "r", 1, 1)),
}


def update(rng: np.random.Generator, kind: Kind = "linear", rank: int = 2, scaling: float = 0.5) -> LoraDelta:
    """A random update of that kind, in float32."""
    a, b = (rng.standard_normal([rank if n == "r" else n for n in shape]).astype(np.float32) for shape in SHAPES[kind])
    return LoraDelta(a, b, scaling, kind)


def linear(rng: np.random.Generator, out: int, n_in: int, rank: int, scaling: float = 1.0) -> LoraDelta:
    """A random update of that shape, in float32."""
    a, b = rng.standard_normal((rank, n_in)), rng.standard_normal((out, rank))
    return LoraDelta(a.astype(np.float32), b.astype(np.float32), scaling)


def adapter(name: str, **weights: LoraDelta) -> LoadedLora:
    """An adapter in memory."""
    return LoadedLora.from_tensors(weights, name=name)


def dense(delta: LoraDelta, scale: float = 1.0) -> np.ndarray:
    """``scale * scaling * B @ A`` in float64: ``[matrices, out, in]``, one matrix but for experts."""
    a, b = delta.a.astype(np.float64), delta.b.astype(np.float64)
    if delta.kind == "conv":
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    found = scale * delta.scaling * (b @ a)
    return found if delta.kind == "experts" else found[None]


def dense_rank(matrix: np.ndarray) -> int:
    """Singular values above 1e-6 of the largest."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(sigma > 1e-6 * sigma[0])) if sigma.size and sigma[0] > 0 else 0


def dense_spaces(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the column space and of the row space."""
    u, _, vt = np.linalg.svd(matrix)
    rank = dense_rank(matrix)
    return u[:, :rank], vt[:rank].T
