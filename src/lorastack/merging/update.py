"""Update: what is done to one stored tensor, block of rows by block of rows, in the order that its file has.

A stored tensor is ``[matrices, rows, columns]``: one matrix but for experts. The sum of all adapters' updates is
``left @ right`` with ``left [rows, R]`` and ``right [R, columns]``, all ranks side by side, so that it is summed in
float32 (float64 when asked) and rounded once. Where the file keeps ``[in, out]`` (an embedding, GPT-2's Conv1D),
``left`` is A^T and ``right`` B^T.

DoRA (`lorastack.torch.dora`): with n = ||W + scaling B A|| of the base's rows, an adapter makes of the weight before
it ``(1 + scale (m/n - 1)) W + scale (m/n) scaling B A``. So each row is multiplied once more by what every adapter
keeps of it, and so are the updates that came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorastack.base.scratch import Scratch
from lorastack.core.delta import LoraDelta, multiplier
from lorastack.core.factor import Factor
from lorastack.core.kronecker import Kronecker
from lorastack.merging.changes import Term, Tokens

#: Numbers of a block: it is read, changed and written while the processor's cache has it.
BLOCK = 1 << 19
#: The base's rows ``[count, columns]`` of one matrix, from this row to that, in scratch where there is some.
Read = Callable[[int, int, int, Scratch | None], np.ndarray]


class Block(NamedTuple):
    """Some rows of one matrix."""

    matrix: int
    first: int
    stop: int


@dataclass(frozen=True)
class Update:
    """What is done to one stored tensor of ``shape`` (matrices, rows, columns).

    ``expert`` and ``first_out`` say which part of the weight the tensor is, where experts are kept one by one.
    """

    weight: str
    shape: tuple[int, int, int]
    turned: bool = False
    terms: tuple[Term, ...] = ()
    replaced: Factor | None = None
    tokens: Tokens | None = None
    added: tuple[tuple[float, Factor], ...] = ()
    dense: tuple[tuple[float, Factor | Kronecker], ...] = ()
    expert: int | None = None
    first_out: int = 0

    def blocks(self, numbers: int = BLOCK) -> Iterator[Block]:
        """The whole tensor in blocks of about so many numbers, in the order of the file."""
        matrices, rows, columns = self.shape
        step = max(1, numbers // max(columns, 1))
        for matrix in range(matrices):
            for first in range(0, rows, step):
                yield Block(matrix, first, min(first + step, rows))

    @property
    def as_saved(self) -> bool:
        """Whether it is what an adapter saved whole, and nothing else."""
        return self.replaced is not None and not (self.terms or self.added or self.tokens or self.dense)

    @property
    def rank(self) -> int:
        """All ranks together."""
        return sum(term.delta.rank for term in self.terms)


class Sum:
    """An update with its factors at hand, for the time its tensor is written. Several threads may compute blocks.

    Parameters
    ----------
    read
        The base's own rows, as numbers in ``dtype``; not asked where all of the tensor is replaced.
    dtype
        The type to compute in: float32 or float64.
    """

    def __init__(self, update: Update, read: Read, dtype: type = np.float32) -> None:
        self.update, self._read, self.dtype = update, read, dtype
        self._factors = [_arrays(term.delta) for term in update.terms]
        self._times = [term.delta.scaling for term in update.terms]
        for term in update.terms:
            multiplier(term.scale, term.delta.scaling, np.dtype(dtype))
        self._replaced = None if update.replaced is None else update.replaced.take().reshape(update.shape)
        self._magnitudes = [
            None if term.magnitude is None else term.magnitude.take().reshape(-1).astype(np.float64)
            for term in update.terms
        ]
        self.dora = any(m is not None for m in self._magnitudes)
        self._right: tuple[int, np.ndarray] | None = None
        self._columns = self._by_column() if self.dora and update.turned else None
        tokens = update.tokens
        self._tokens = None if tokens is None else (np.asarray(tokens.ids, np.int64), tokens.rows.take())

    def base_rows(self, at: Block, scratch: Scratch | None = None) -> np.ndarray:
        """What is started from: the base's rows, or those of the weight that an adapter brings along."""
        if self._replaced is None:
            return self._read(*at, scratch)
        return self._replaced[at.matrix, at.first : at.stop].astype(self.dtype)

    def new_rows(self, at: Block, scratch: Scratch | None = None, start: np.ndarray | None = None) -> np.ndarray:
        """The merged rows ``[count, columns]`` of a block, not rounded yet; in ``scratch`` where there is some.

        They are made of ``start``, which are the base's rows and are changed, where somebody has read them.
        """
        rows = self.base_rows(at, scratch) if start is None else start
        if self._tokens is not None:
            ids, values = self._tokens
            inside = (ids >= at.first) & (ids < at.stop)
            rows[ids[inside] - at.first] = values[inside].astype(self.dtype)
        if self.update.terms:
            keep, left, right = self.parts(at, rows)
            if keep is not None:
                rows *= keep
            if scratch is None:
                rows += left @ right
            else:
                rows += np.matmul(left, right, out=scratch.array("delta", rows.shape, self.dtype))
        for times, value in self.update.dense:
            rows += full_rows(value, at.first, at.stop, self.dtype) * self.dtype(times)
        for times, bias in self.update.added:
            rows += bias.take().reshape(1, -1)[:, : rows.shape[1]].astype(self.dtype) * self.dtype(times)
        return rows

    def parts(self, at: Block, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """(keep, left, right): the merged rows are ``keep * rows + left @ right``; no ``keep`` means 1."""
        if not self.dora:
            left = self._left(at, [scale * t for (_, scale, *_), t in zip(self.update.terms, self._times, strict=True)])
            return None, left, self._right_of(at.matrix)
        if self._columns is not None:
            keep, gains = self._columns
            return keep, self._left(at, [1.0] * len(gains)), self._gained(at.matrix, gains)
        right = self._right_of(at.matrix)
        left = self._left(at, [1.0] * len(self._times))
        keep, gains = self._kept_and_gains(slice(at.first, at.stop), lambda n: self._norms(rows, left, right, n))
        for n, ranks in enumerate(self._spans()):
            left[:, ranks] *= np.asarray(gains[n], self.dtype).reshape(-1, 1)
        return np.asarray(keep, self.dtype).reshape(-1, 1), left, right

    def _kept_and_gains(self, outs: slice, norm: Callable[[int], np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """What is kept of the base's rows after all adapters, and what each one's ``B A`` is multiplied by."""
        keep: np.ndarray = np.ones(1)
        gains: list[np.ndarray] = []
        for n, term in enumerate(self.update.terms):
            magnitude = self._magnitudes[n]
            if magnitude is None:
                gains.append(np.full(1, term.scale * self._times[n]))
                continue
            ratio = magnitude[outs] / norm(n)
            kept = 1.0 + term.scale * (ratio - 1.0)
            gains = [gain * kept for gain in gains] + [term.scale * ratio * self._times[n]]
            keep = keep * kept
        return keep, gains

    def _norms(self, rows: np.ndarray, left: np.ndarray, right: np.ndarray, n: int) -> np.ndarray:
        """||W + scaling B A|| of one adapter, row by row."""
        ranks = self._spans()[n]
        changed = rows + (left[:, ranks] * self.dtype(self._times[n])) @ right[ranks]
        return np.sqrt(np.einsum("ij,ij->i", changed, changed, dtype=np.float64))

    def _by_column(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The same for ``[in, out]``, whose columns are DoRA's rows: they are measured in a pass of their own."""
        squares = {n: np.zeros(self.update.shape[2]) for n, m in enumerate(self._magnitudes) if m is not None}
        right, spans = self._right_of(0), self._spans()
        for at in self.update.blocks():
            rows, left = self.base_rows(at), self._left(at, [1.0] * len(self._times))
            for n, square in squares.items():
                changed = rows + (left[:, spans[n]] * self.dtype(self._times[n])) @ right[spans[n]]
                square += np.einsum("ij,ij->j", changed, changed, dtype=np.float64)
        keep, gains = self._kept_and_gains(slice(None), lambda n: np.sqrt(squares[n]))
        return np.asarray(keep, self.dtype), gains

    def _gained(self, matrix: int, gains: Sequence[np.ndarray]) -> np.ndarray:
        right = self._right_of(matrix).copy()
        for gain, ranks in zip(gains, self._spans(), strict=True):
            right[ranks] *= np.asarray(gain, self.dtype)
        return right

    def _spans(self) -> list[slice]:
        """Which ranks are whose."""
        ends = np.cumsum([term.delta.rank for term in self.update.terms]).tolist()
        return [slice(end - term.delta.rank, end) for end, term in zip(ends, self.update.terms, strict=True)]

    def _left(self, at: Block, times: Sequence[float]) -> np.ndarray:
        """``[rows, R]`` of a block, each adapter's ranks multiplied."""
        left: np.ndarray = np.empty((at.stop - at.first, self.update.rank), self.dtype)
        for (a, b), ranks, factor in zip(self._factors, self._spans(), times, strict=True):
            if self.update.turned:
                part = _matrix(a, at.matrix, self.update.expert)[:, at.first : at.stop].T
            else:
                start = self.update.first_out
                part = _matrix(b, at.matrix, self.update.expert)[start + at.first : start + at.stop]
            np.multiply(part, self.dtype(factor), out=left[:, ranks], casting="unsafe", dtype=self.dtype)
        return left

    def _right_of(self, matrix: int) -> np.ndarray:
        """``[R, columns]``, kept while blocks of one matrix follow each other."""
        kept = self._right
        if kept is not None and kept[0] == matrix:
            return kept[1]
        found = [
            _matrix(b, matrix, self.update.expert).T if self.update.turned else _matrix(a, matrix, self.update.expert)
            for a, b in self._factors
        ]
        right = np.concatenate([part.astype(self.dtype) for part in found])
        self._right = matrix, right
        return right


def full_rows(value: Factor | Kronecker, first: int, stop: int, dtype: type = np.float32) -> np.ndarray:
    """Rows ``[stop - first, columns]`` of an update of full rank, a kernel's positions side by side."""
    if isinstance(value, Kronecker):
        return value.rows(first, stop, dtype)
    array = value.array
    return array.reshape(math.prod(array.shape[:1]) if array.ndim > 1 else 1, -1)[first:stop].astype(dtype)


def _arrays(delta: LoraDelta) -> tuple[np.ndarray, np.ndarray]:
    """A and B in the types they are stored in, one matrix for each expert; a kernel's positions side by side."""
    a, b = (factor.take() for factor in delta.factors)
    if delta.kind == "conv":
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    return a, b


def _matrix(factor: np.ndarray, matrix: int, expert: int | None) -> np.ndarray:
    return factor if factor.ndim == 2 else factor[matrix if expert is None else expert]


def shape_in_file(shape: tuple[int, ...], kind: str | None) -> tuple[int, int, int]:
    """A tensor's dimensions as matrices, rows and columns; ``kind`` is that of the updates at it, if there are any.

    >>> shape_in_file((8, 16, 4), "experts"), shape_in_file((16, 3, 5, 5), "conv"), shape_in_file((7,), None)
    ((8, 16, 4), (1, 16, 75), (1, 1, 7))
    """
    if kind in ("experts", "stored") and len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if kind == "conv":
        return 1, shape[0], math.prod(shape[1:])
    return 1, math.prod(shape[:-1]), shape[-1] if shape else 1
