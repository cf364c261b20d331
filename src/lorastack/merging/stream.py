"""Stream: the tensors of a new base as bytes, a block of rows at a time, computed while the last ones are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias

import gguf
import numpy as np

from lorastack.base.model import Part
from lorastack.base.rows import Rows
from lorastack.base.scratch import Pool, Scratch
from lorastack.core.dtypes import nonfinite_count
from lorastack.errors import FormatError
from lorastack.formats.opened import OpenedFile
from lorastack.merging.importance import Importance
from lorastack.merging.packing import FLOATS, pack
from lorastack.merging.rounding import Rounding
from lorastack.merging.update import Block, Sum, Update
from lorastack.pipeline import ahead

#: Bytes that are copied at once.
CHUNK = 1 << 23
_POOL = Pool()
#: Computes the next bytes of a file.
Job: TypeAlias = Callable[[], np.ndarray]
#: Called with the bytes written since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class How:
    """How merged numbers are computed and kept: ``exact`` sums in float64."""

    exact: bool = False
    rounding: Rounding = field(default_factory=Rounding)
    importance: Importance | None = None
    outtype: str | None = None


class Merging:
    """One changed tensor: its new rows, in the type ``kind`` they are written in.

    ``part`` is where the base has it, or the embedding that a new head was one with.
    """

    def __init__(self, part: Part, update: Update, kind: str, how: How) -> None:
        self.update, self.kind, self.how = update, kind, how
        self.rows = Rows(part, update.shape[2])
        self.wide = np.float64 if how.exact or self.rows.kind == "F64" else np.float32
        self.sum = Sum(update, self.read, self.wide)

    def read(self, matrix: int, first: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        """The base's rows of one matrix."""
        start = matrix * self.update.shape[1]
        return self.rows.read(start + first, start + stop, self.wide, scratch)

    def rounded(self, at: Block, rows: np.ndarray) -> np.ndarray:
        """Merged rows as the bytes that are written."""
        name, matrix = self.update.weight, at.matrix
        if self.kind in FLOATS:
            number = matrix * self.update.shape[1] + at.first
            out = self.how.rounding.to(rows, _dtype(self.kind), name, number)
            if nonfinite_count(out):
                self._refuse_new(at, out)
            return np.ascontiguousarray(out).view(np.uint8).reshape(-1)
        if nonfinite_count(rows):
            self._refuse_new(at, rows)
        matters = self.how.importance.of(name, matrix, rows.shape[1]) if self.how.importance else None
        return pack(rows, self.kind, matters)

    def back(self, raw: np.ndarray) -> np.ndarray:
        """Bytes that were written as numbers again, ``[rows, columns]``."""
        if self.kind in FLOATS:
            return raw.view(_dtype(self.kind)).reshape(-1, self.update.shape[2]).astype(self.wide)
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        rows = raw.reshape(-1, self.update.shape[2] // size[0] * size[1])
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.kind]).astype(self.wide, copy=False)

    def jobs(self) -> Iterator[Job]:
        """What computes the bytes of the whole tensor, block by block."""
        return (partial(self._block, at) for at in self.update.blocks())

    def _block(self, at: Block) -> np.ndarray:
        with _POOL.one() as scratch:
            return self.rounded(at, self.sum.new_rows(at, scratch))

    def _refuse_new(self, at: Block, out: np.ndarray) -> None:
        """NaN and Inf that the base has itself stay; others are a sum that the type does not hold."""
        before = self.sum.base_rows(at)
        if nonfinite_count(out) > nonfinite_count(before):
            raise FormatError(
                f"weight {self.update.weight}: the sum is NaN or more than {self.kind} holds, in rows {at.first} to "
                f"{at.stop - 1}; use smaller scales"
            )


class Planned(Protocol):
    """One tensor of a new base: a changed one, or the base's own where there is no update."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def part(self) -> Part: ...
    @property
    def update(self) -> Update | None: ...
    @property
    def size(self) -> int: ...


def contents(tensors: Iterable[Planned], how: How, alignment: int = 1) -> Iterator[np.ndarray]:
    """The bytes of one tensor after the other, each filled up with zeros; computed ahead of use, across tensors too."""
    return ahead(job for tensor in tensors for job in _jobs(tensor, how, alignment))


def _jobs(tensor: Planned, how: How, alignment: int) -> Iterator[Job]:
    if tensor.update is None:
        yield from copies(Rows(tensor.part))
    else:
        yield from Merging(tensor.part, tensor.update, tensor.kind, how).jobs()
    if missing := -tensor.size % alignment:
        yield partial(np.zeros, missing, np.uint8)


def copies(rows: Rows) -> Iterator[Job]:
    """What reads the bytes of a tensor as they are, in chunks."""
    return spans(rows.file, rows.start, rows.start + rows.size)


def spans(file: OpenedFile, start: int, stop: int) -> Iterator[Job]:
    """What reads bytes of an open file, in chunks."""
    return (partial(file.array, at, min(CHUNK, stop - at)) for at in range(start, stop, CHUNK))


def _dtype(kind: str) -> np.dtype:
    if kind == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(FLOATS[kind])
