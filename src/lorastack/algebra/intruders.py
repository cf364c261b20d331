"""Intruder dimensions: leading singular vectors of base + update that are like none of the base's.

After Shuttleworth et al. 2024 (arXiv:2410.21228): of the ``leading`` left singular vectors of ``W + D``, those whose
cosine with every left singular vector of W is below ``epsilon`` in size.

With ``W = U diag(S) V^T`` and ``D = Q v^T``, v orthonormal, ``(W + D)(W + D)^T = W W^T + P Q^T + Q P^T + Q Q^T`` where
``P = W v``. In the coordinates of U, and of the few directions that Q adds to it, the first is ``diag(S²)``: a vector's
coordinates are its cosines, and a product with the whole costs O(out * rank). So one decomposition of W serves every
adapter at every scale, and of it only U and S are kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorastack.algebra.span import Span
from lorastack.base import BaseModel
from lorastack.errors import LoraStackError
from lorastack.files import open_regular, present, whole_output

#: Singular values of the base below this part of its largest are zero: their vectors could be any others.
_NOTHING = 1e-6
#: Up to this size a symmetric matrix is decomposed as it is.
_SMALL = 512
_ROUNDS = 20
_DEPTH = 6
_SETTLED = 1e-6
_ROUNDING = 1e-6
#: Weights with more elements are worked on in float32.
_LARGE = 1 << 21


class LeftVectors(NamedTuple):
    """The left singular vectors ``u [out, m]`` of a base weight and its singular values ``sigma [m]``, descending."""

    u: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class IntruderSearch:
    """How to look for intruders.

    Attributes
    ----------
    leading
        How many of the leading singular vectors of each weight to look at (k of the paper).
    epsilon
        A vector is an intruder when no cosine reaches this.
    cache
        Keep the base's singular vectors in `cache_folder`; another folder, or None to keep nothing.
    """

    leading: int = 10
    epsilon: float = 0.5
    cache: bool | Path | None = True

    def count(self, left: LeftVectors, weight: np.ndarray, update: Span) -> tuple[int, int]:
        """``(intruders, vectors looked at)`` of one update ``[out, in]`` of one base weight."""
        likeness = likenesses(left, weight, update, self.leading)
        return int(np.count_nonzero(likeness < self.epsilon)), len(likeness)

    def left(self, base: BaseModel, name: str, number: int, weight: np.ndarray) -> LeftVectors:
        """The base's left singular vectors of one matrix, out of the cache where it has them."""
        place = base.stored.get(name)
        folder = cache_folder() if self.cache is True else self.cache
        if not folder or place is None:
            return left_vectors(weight)
        path = folder / f"{_key(place.files, name, number, weight.shape)}.npz"
        return _read(path) or _write(path, left_vectors(weight))


def cache_folder() -> Path:
    """Where singular vectors of bases are kept: ``$XDG_CACHE_HOME/lorastack/svd``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorastack" / "svd"


def left_vectors(weight: np.ndarray) -> LeftVectors:
    """U and S of ``weight [out, in]`` through the Gram matrix of its shorter side; a large U is kept in float32.

    That loses what is below 1e-6 of the largest singular value, where the base's own rounding is, and is several
    times as fast as an SVD.
    """
    wide = weight.astype(np.float64)
    tall = wide.shape[0] > wide.shape[1]
    squares, vectors = np.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    sigma = np.sqrt(np.maximum(squares[::-1], 0))
    kept = int(np.count_nonzero(sigma > _NOTHING * sigma[0]))
    sigma, vectors = sigma[:kept], vectors[:, ::-1][:, :kept]
    return LeftVectors(((wide @ vectors) / sigma if tall else vectors).astype(_kept_as(weight)), sigma)


def likenesses(left: LeftVectors, weight: np.ndarray, update: Span, leading: int = 10) -> np.ndarray:
    """For each of the leading left singular vectors of ``weight + update``, its largest cosine with one of ``weight``.

    Descending by singular value; fewer than ``leading`` where the sum has a lower rank.

    Examples
    --------
    >>> weight = np.diag([3.0, 2.0, 1.0, 0.0])
    >>> fourth = np.eye(4)[:, 3:]
    >>> update = Span(fourth, np.array([5.0]), fourth)
    >>> likenesses(left_vectors(weight), weight, update, leading=2)
    array([0., 1.])
    """
    q = update.u * update.sigma
    inside = left.u.T @ q
    outer = _outside(left.u, q - left.u @ inside, float(np.linalg.norm(q)))
    dtype = _kept_as(weight)
    p = left.u.T @ (weight.astype(dtype, copy=False) @ update.v.astype(dtype))
    q = np.concatenate([inside, outer.T @ q])
    p = np.concatenate([p, np.zeros((outer.shape[1], p.shape[1]))])
    squares = np.concatenate([left.sigma**2, np.zeros(outer.shape[1])])
    values, vectors = _leading(squares, p, q, min(leading, *weight.shape))
    real = values > (_NOTHING**2) * max(values[0], 0) if len(values) else np.zeros(0, bool)
    found: np.ndarray = np.abs(vectors[: len(left.sigma), real]).max(0, initial=0.0)
    return found


def _kept_as(weight: np.ndarray) -> type:
    return np.float64 if weight.size <= _LARGE else np.float32


def _outside(u: np.ndarray, rest: np.ndarray, size: float) -> np.ndarray:
    """The directions of ``rest`` that U lacks, orthonormal: no vector of the base has any part in them."""
    if u.shape[0] == u.shape[1]:
        return np.zeros((len(u), 0))
    directions, lengths, _ = np.linalg.svd(rest, full_matrices=False)
    # A large U is kept in float32: what is left below that is its rounding, no direction.
    directions = directions[:, lengths > _ROUNDING * size]
    found, _ = np.linalg.qr(directions - u @ (u.T @ directions))
    return found


def _leading(squares: np.ndarray, p: np.ndarray, q: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of ``diag(squares) + p q^T + q p^T + q q^T`` with their vectors, descending."""
    size = len(squares)
    count = min(count, size)

    def times(x: np.ndarray) -> np.ndarray:
        along = q.T @ x
        return squares[:, None] * x + p @ along + q @ (p.T @ x + along)

    start = 2 * count + 2 * q.shape[1]
    if size <= max(_SMALL, (_DEPTH + 1) * start):
        return _whole(times(np.eye(size)), count)
    # Block Krylov with restarts. The wanted vectors lie mostly among the base's first and what the update adds.
    space, _ = np.linalg.qr(np.concatenate([np.eye(size, 2 * count), q, p], 1))
    for _ in range(_ROUNDS):
        for _ in range(_DEPTH):
            # The newest columns alone go on: those before have been multiplied already.
            newest = times(space[:, -start:])
            for _ in range(2):  # once would leave the rounding of what is taken away
                newest, _ = np.linalg.qr(newest - space @ (space.T @ newest))
            space = np.concatenate([space, newest], 1)
        image = times(space)
        values, turn = np.linalg.eigh(space.T @ image)
        turn = turn[:, ::-1][:, :start]
        values, space, image = values[::-1][:start], space @ turn, image @ turn
        rest = np.linalg.norm(image[:, :count] - space[:, :count] * values[:count], axis=0)
        if np.all(rest <= _SETTLED * values[0]):
            return values[:count], space[:, :count]
    return _whole(times(np.eye(size)), count)


def _whole(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:count], vectors[:, ::-1][:, :count]


def _key(files: Sequence[Path], name: str, number: int, shape: tuple[int, ...]) -> str:
    """Another file, or a file written since, has another key; so has a weight that is taken the other way round."""
    states = [(str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    said = (*states, name, number, shape)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _read(path: Path) -> LeftVectors | None:
    if not present(path):
        return None
    try:
        with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
            left = LeftVectors(file["u"], file["sigma"])
    except Exception:  # whatever a damaged byte makes of a zip archive: encryption, methods and versions not known
        return None  # a damaged one is made anew
    whole = (
        left.u.ndim == 2 and left.sigma.shape == left.u.shape[1:] and left.u.dtype.kind == left.sigma.dtype.kind == "f"
    )
    return left if whole and np.isfinite(left.u).all() and np.isfinite(left.sigma).all() else None


def _write(path: Path, left: LeftVectors) -> LeftVectors:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_output(path, force=True) as scratch, scratch.open("wb") as file:
            np.savez(file, u=left.u, sigma=left.sigma)
    except (OSError, LoraStackError):
        pass  # a cache that cannot be written only costs the time again
    return left
