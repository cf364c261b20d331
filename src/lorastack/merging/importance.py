"""Importance: an importance matrix of llama.cpp's, which says how much each input of a weight matters."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorastack.errors import FormatError, shown
from lorastack.files import read_regular
from lorastack.formats.gguf import open_reader
from lorastack.formats.heads import is_gguf, read_head

_SUMS, _COUNTS = ".in_sum2", ".counts"
#: No file of the old format is larger: a number for each input of each layer.
_MOST = 1 << 30


@dataclass(frozen=True)
class Importance:
    """Weight -> ``[matrices, columns]`` in float32: the mean square of each input over the text it was measured on."""

    values: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Importance:
        """From a file that llama-imatrix wrote, in GGUF or in the older format.

        Raises
        ------
        FormatError
            When it is neither, or damaged.
        """
        return cls(_from_gguf(path) if is_gguf(read_head(path)) else _from_dat(path))

    def of(self, weight: str, matrix: int, columns: int) -> np.ndarray | None:
        """The line of one matrix; None where nothing was measured."""
        found = self.values.get(weight)
        if found is None:
            return None
        lines = found.reshape(-1, columns)
        return lines[matrix if len(lines) > 1 else 0]


def _from_gguf(path: Path) -> dict[str, np.ndarray]:
    header = open_reader(path)
    values = {}
    for name, tensor in header.by_name.items():
        counts = header.by_name.get(name.removesuffix(_SUMS) + _COUNTS)
        if name.endswith(_SUMS) and counts is not None:
            sums = tensor.data.reshape(-1, tensor.dims[0]).astype(np.float32)
            each = counts.data.reshape(-1, 1).astype(np.float32)
            # An expert that no token came to says nothing: all its inputs matter alike.
            values[name.removesuffix(_SUMS)] = np.where(each > 0, sums / np.maximum(each, 1), np.float32(1))
    if not values:
        raise FormatError(f"{path}: it is no importance matrix: it has no tensor NAME{_SUMS} with NAME{_COUNTS}")
    return values


def _from_dat(path: Path) -> dict[str, np.ndarray]:
    """llama.cpp before 2025: a count, then name, calls, length and sums of each weight."""
    raw = read_regular(path, _MOST)
    values: dict[str, np.ndarray] = {}
    at = 4
    try:
        (count,) = struct.unpack_from("<i", raw)
        for _ in range(count):
            (length,) = struct.unpack_from("<i", raw, at)
            name = raw[at + 4 : at + 4 + length].decode()
            calls, size = struct.unpack_from("<ii", raw, at + 4 + length)
            at += 12 + length
            if length < 0 or size < 0 or at + 4 * size > len(raw):
                raise ValueError(f"{shown(name)} has {size} values")
            values[name] = np.frombuffer(raw, "<f4", size, at) / np.float32(max(calls, 1))
            at += 4 * size
    except (struct.error, ValueError) as error:
        raise FormatError(f"{path}: it is no importance matrix of llama.cpp, or damaged: {error}") from error
    return values
