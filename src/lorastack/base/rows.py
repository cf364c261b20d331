"""Rows: one tensor of a base's files, read a block of rows at a time, so that none is ever in memory whole."""

from __future__ import annotations

import math

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorastack.base.model import Part
from lorastack.base.scratch import Scratch
from lorastack.errors import UnsupportedError
from lorastack.formats.gguf_header import PLAIN
from lorastack.formats.opened import OpenedFile
from lorastack.formats.safetensors_file import FLOATS, SafetensorsFile, numpy_dtype

#: Types of GGUF tensors that are floats by themselves; safetensors calls them so too.
_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})


class Rows:
    """The rows of one stored tensor, ``[count, columns]`` whatever its dimensions, in the order of the file.

    ``kind`` is its type as the file names it; `read` gives numbers, `raw` the bytes.

    Parameters
    ----------
    columns
        The length of a row: the last dimension when not given. Packed types have no other.
    """

    def __init__(self, part: Part, columns: int | None = None) -> None:
        held = part.file
        if isinstance(held, SafetensorsFile):
            self.kind, self.shape, start, stop = held.tensors[part.key]
            self.start, self.size = held.data_start + start, stop - start
            self.file = held.files[0]
            if part.rows is not None:
                first, last = part.rows
                each = self.size // self.shape[0]
                self.start, self.size = self.start + first * each, (last - first) * each
                self.shape = (last - first, *self.shape[1:])
        else:
            tensor = held.by_name[part.key]
            assert isinstance(held.source, OpenedFile)
            self.kind, self.shape = tensor.tensor_type.name, tensor.dims[::-1]
            self.start, self.size, self.file = tensor.start, tensor.size, held.source
        self.part = part
        self.columns = columns or (self.shape[-1] if self.shape else 1)
        elements = math.prod(self.shape)
        self.count = elements // self.columns if self.columns else 0
        self.row_bytes = self.size // self.count if self.count else 0

    def __repr__(self) -> str:
        return f"Rows({self.file}: tensor {self.part.key}, {self.kind} {list(self.shape)})"

    def raw(self, first: int, stop: int) -> np.ndarray:
        """The bytes of some rows, in memory of their own."""
        return self.file.array(self.start + first * self.row_bytes, (stop - first) * self.row_bytes)

    def read(self, first: int, stop: int, dtype: type = np.float32, scratch: Scratch | None = None) -> np.ndarray:
        """Some rows as numbers, ``[stop - first, columns]``, in float32 or float64; in ``scratch`` where there is some.

        Raises
        ------
        UnsupportedError
            When the type is none of numbers that ``gguf`` or this package reads.
        FormatError
            When the file was changed since it was opened, or cannot be read.
        """
        if scratch is None:
            raw = self.raw(first, stop)
        else:
            raw = scratch.array("bytes", ((stop - first) * self.row_bytes,), np.uint8)
            self.file.fill(raw, self.start + first * self.row_bytes)
        rows = stop - first
        floats = self._floats()
        if floats is not None:
            stored = raw.view(floats).reshape(rows, self.columns)
            if scratch is None:
                return stored.astype(dtype)
            numbers = scratch.array("rows", (rows, self.columns), dtype)
            np.copyto(numbers, stored, casting="unsafe")
            return numbers
        try:
            kind = GGMLQuantizationType[self.kind]
            with np.errstate(all="ignore"):  # a scale of Inf or NaN is the base's own
                found = gguf.quants.dequantize(raw.reshape(rows, -1), kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise UnsupportedError(
                f"{self.file}: tensor {self.part.key} of type {self.kind} cannot be read: {error}"
            ) from error
        return found.reshape(rows, self.columns).astype(dtype, copy=False)

    def _floats(self) -> np.dtype | None:
        """NumPy's type for what is stored; None for packed types."""
        if isinstance(self.part.file, SafetensorsFile) and self.kind not in FLOATS:
            raise UnsupportedError(f"{self.file}: tensor {self.part.key} is {self.kind}, no floating-point weight")
        plain = isinstance(self.part.file, SafetensorsFile) or self.kind in _FLOATS
        return numpy_dtype(self.kind) if plain else None


def block_of(kind: str) -> int:
    """How many numbers a GGUF type packs together."""
    return 1 if kind in PLAIN else GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
