"""Stream: one tensor of the new base as its bytes, a block of rows at a time, computed while the last is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

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

    def blocks(self) -> Iterator[np.ndarray]:
        """The bytes of the whole tensor, block by block, computed ahead of being written."""
        return ahead(partial(self._block, at) for at in self.update.blocks())

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


def span(file: OpenedFile, start: int, stop: int, progress: Progress) -> Iterator[bytes]:
    """Bytes of an open file as they are, in chunks."""
    for at in range(start, stop, CHUNK):
        size = min(CHUNK, stop - at)
        yield file.read(at, size)
        progress(size)


def _dtype(kind: str) -> np.dtype:
    if kind == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(FLOATS[kind])
