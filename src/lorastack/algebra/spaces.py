"""Spaces: in which coordinates the entries of several updates of one weight are taken, and the way back.

All three depend on the updates alone, never on how they are factored: rotating an adapter's A and B
against each other leaves its update, and so what is made of it, as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lorastack.algebra.lowrank import Matrix, basis, narrowed, svd
from lorastack.algebra.tiles import row_blocks

#: Directions with less than this part of the largest singular value are float64's rounding.
_NOTHING = 1e-10


class Coordinates(NamedTuple):
    """The updates as arrays of ``shape`` in blocks of rows: ``blocks()`` gives ``(rows, one array for each)``.

    ``back`` turns a combined array into a low-rank matrix; None where the coordinates are the entries
    themselves, of which no array is ever whole.
    """

    shape: tuple[int, int]
    blocks: Callable[[], Iterator[tuple[slice, list[np.ndarray]]]]
    back: Callable[[np.ndarray], Matrix] | None


def dense(updates: Sequence[Matrix]) -> Coordinates:
    """The entries of ``B @ A``, a block of rows at a time."""
    shape = updates[0].shape

    def blocks() -> Iterator[tuple[slice, list[np.ndarray]]]:
        for rows in row_blocks(shape):
            yield rows, [narrowed(update.b[rows] @ update.a) for update in updates]

    return Coordinates(shape, blocks, None)


def knots(updates: Sequence[Matrix]) -> Coordinates:
    """KnOTS (Stoica et al. 2024, arXiv:2410.19735): ``U^T D_i``, which are the ``Σ V_i^T`` of the paper.

    U are the left singular vectors of ``[D_1, D_2, ...]``. ``[R, in]`` entries for each update.
    """
    left = basis(np.concatenate([update.b for update in updates], 1))
    cores = np.split(left.core, np.cumsum([update.rank for update in updates])[:-1], 1)
    rows = [core @ update.a for core, update in zip(cores, updates, strict=True)]
    inner, sigma, _ = np.linalg.svd(basis(np.concatenate(rows, 1).T).core.T, full_matrices=False)
    inner = inner[:, sigma > _NOTHING * sigma[:1]]
    u = left.lift(inner)
    return _whole([inner.T @ part for part in rows], lambda merged: Matrix(u, merged))


def core(updates: Sequence[Matrix]) -> Coordinates:
    """Core Space (Panariello et al. 2025, arXiv:2509.17786): ``U^T D_i V``, ``[R, R]`` entries for each update.

    U and V are the singular vectors of all lora_B side by side and of all lora_A on top of each other. The
    paper takes the factors as trained; here each update is first factored by its own SVD with the singular
    values shared evenly, without which U and V, and so the result, would depend on the factorisation.
    """
    balanced = [_balanced(update) for update in updates]
    u = _left_vectors(np.concatenate([update.b for update in balanced], 1))
    v = _left_vectors(np.concatenate([update.a for update in balanced]).T)
    parts = [(u.T @ update.b) @ (update.a @ v) for update in balanced]
    return _whole(parts, lambda merged: Matrix(u @ merged, v.T))


SPACES: dict[str, Callable[[Sequence[Matrix]], Coordinates]] = {"dense": dense, "knots": knots, "core": core}


def _whole(parts: list[np.ndarray], back: Callable[[np.ndarray], Matrix]) -> Coordinates:
    narrow = [narrowed(part) for part in parts]
    rows = slice(0, parts[0].shape[0])
    return Coordinates(parts[0].shape, lambda: iter([(rows, narrow)]), lambda merged: back(merged.astype(np.float64)))


def _balanced(update: Matrix) -> Matrix:
    parts = svd(update)
    return parts.truncated(int(np.sum(parts.sigma > _NOTHING * parts.sigma[:1])))


def _left_vectors(x: np.ndarray) -> np.ndarray:
    """The left singular vectors of a tall matrix, ``[n, k]``."""
    tall = basis(x)
    u, sigma, _ = np.linalg.svd(tall.core, full_matrices=False)
    return tall.lift(u[:, sigma > _NOTHING * sigma[:1]])
