"""A safetensors file: its header checked, its tensors as lazily read factors.

The ``safetensors`` package gives NumPy no bfloat16 and does not say where a tensor lies, so the header
is read here, with the package's own rules (safetensors/src/tensor.rs: at most 100 MB, every offset in
order, no hole, no overlap, no byte left over). Parsing it is what opening a file costs, so ``orjson`` does it.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.heads import unreadable
from lorastack.formats.limits import MAX_NAME, MAX_TENSORS, MOST_LISTED, parsed_size_problem
from lorastack.formats.opened import OpenedFile

MAX_HEADER = 100_000_000
#: What every NumPy can hold.
MAX_DIMENSIONS = 32
_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
         "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}  # fmt: skip
#: How much of a file is read at first: the header of an adapter of every linear layer of a 7B model has 60 KB.
_FIRST = 1 << 16
_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}  # fmt: skip
#: What one number, such as an alpha, may be stored as.
NUMBERS = frozenset({*_PLAIN, "BF16"})
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

#: (dtype, shape, first byte after the header, last byte + 1)
Info = tuple[str, tuple[int, ...], int, int]


class SafetensorsFile:
    """One open file: ``tensors`` (name -> dtype, shape, span) and ``metadata``; `factor` reads one lazily.

    Raises
    ------
    FormatError
        Listing every entry that is wrong.
    """

    def __init__(self, path: Path | OpenedFile) -> None:
        file = OpenedFile.of(path)
        self.path, self.files = file.path, (file,)
        self.notes: tuple[str, ...] = ()
        size = file.size
        first = file.read(0, min(_FIRST, size))  # with most headers in it
        length = int.from_bytes(first[:8], "little")
        if size < 10 or length > min(size - 8, MAX_HEADER):
            raise unreadable(
                file,
                "safetensors",
                f"no safetensors file, or cut short: it says its header has {length} bytes, the file has {size}; "
                "fetch it again",
            )
        self._file, self._start = file, 8 + length
        raw = first[8 : 8 + length] if 8 + length <= len(first) else file.read(8, length)
        header, self.metadata = _parse(raw, file)
        room = size - self._start
        self.tensors: dict[str, Info] = _in_order(header, room) or _checked(header, room, self.path)

    @property
    def data_start(self) -> int:
        """The first byte behind the header, from which tensors are counted."""
        return self._start

    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor:
        """The tensor as a `Factor` that reads it from the file into memory of its own."""
        stored, shape, start, stop = self.tensors[name]
        dtype = numpy_dtype(stored)

        def read() -> np.ndarray:
            return self._file.array(self._start + start, stop - start).view(dtype).reshape(shape)

        return Factor(shape, dtype, read, f"{self.path}: tensor {name}", allow_nonfinite, stored)


def numpy_dtype(stored: str) -> np.dtype:
    """The NumPy dtype of a safetensors dtype name, with ``ml_dtypes`` for those NumPy lacks."""
    plain = _PLAIN.get(stored)
    if plain:
        return np.dtype(plain)
    import ml_dtypes

    other = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[stored]
    return np.dtype(getattr(ml_dtypes, other))


def _parse(raw: bytes, file: OpenedFile) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header, and its metadata."""
    path = file.path
    if problem := parsed_size_problem(raw, file.size):
        raise FormatError(f"{path}: its header is damaged: {problem}")
    try:
        header = orjson.loads(raw)
    except ValueError as error:
        why = f"damaged or no safetensors file: its header is no JSON ({error})"
        raise unreadable(file, "safetensors", why) from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is no JSON object; it is no safetensors file")
    quotes = 2 if "__metadata__" in header else 0
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX writes null there
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ in the header is no object of texts; the file is damaged")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path}: it has {len(header)} tensors, at most {MAX_TENSORS} are read")
    if (longest := max(map(len, header), default=0)) > MAX_NAME:
        raise FormatError(f"{path}: the name of a tensor has {longest} letters, at most {MAX_NAME} are read")
    # A name given twice would silently lose one of the two: the parser keeps the last. How many quotes a header
    # without twins has is known, unless some are spelt as \u0022.
    quotes += 10 * len(header) + orjson.dumps(metadata).count(b'"')
    if raw.count(b'"') != quotes or (b"\\" in raw and b"\\u" in raw):  # one byte is found far sooner than two
        _refuse_twins(raw, path)
    return header, metadata


def _refuse_twins(raw: bytes, path: Path) -> None:
    """Raise when an object in the header has a key twice; the standard parser can tell."""
    import json

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
            raise FormatError(f"{path}: {shown(twice)} appears twice in the header; it is damaged")
        return dict(pairs)

    try:
        json.loads(raw, object_pairs_hook=unique)
    except RecursionError:
        raise FormatError(f"{path}: its header is nested too deeply; it is no safetensors file") from None


def _in_order(header: dict[str, Any], room: int) -> dict[str, Info] | None:
    """The entries of a sound file whose header is in the order of its data, as every writer leaves it.

    This loop is half the cost of opening a file. None when anything is unusual: `_checked` then says what.
    """
    tensors: dict[str, Info] = {}
    end, whole = 0, int
    try:
        for name, entry in header.items():
            stored, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if len(shape) == 2:  # nearly always
                rows, columns = shape
                shape = rows, columns
                if not (type(rows) is type(columns) is whole and rows > 0 < columns):
                    return None
                size = _ITEM[stored] * rows * columns
            else:
                size = _ITEM[stored]
                if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
                    return None
                for n in (shape := tuple(shape)):
                    if type(n) is not int or not 0 < n <= room:
                        return None
                    size *= n
            if start != end or stop - start != size or not (type(start) is type(stop) is whole):
                return None
            tensors[name] = stored, shape, start, stop
            end = stop
    except (KeyError, TypeError, ValueError):
        return None
    return tensors if end == room else None


def _checked(header: dict[str, Any], room: int, path: Path) -> dict[str, Info]:
    problems = Problems(f"cannot read {path}")
    tensors: dict[str, Info] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if len(problems.lines) == MOST_LISTED:
            problems.add("and so on; the file is damaged")
            break
        try:
            if not isinstance(entry["shape"], list):  # an empty text would do for a number's
                raise TypeError
            stored, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            # An array without elements can still have more dimensions than NumPy can multiply.
            sound = sound and math.prod(n or 1 for n in shape) < 1 << 60
            size = math.prod(shape) * _ITEM[stored] if sound else -1
        except (KeyError, TypeError, ValueError):
            problems.add(f"tensor {name!r}: its entry {shown(entry)} has no known dtype, shape and data_offsets")
            continue
        if not sound or stop - start != size:
            problems.add(f"tensor {name!r}: {stored} of {shown(list(shape))} does not fill bytes {start} to {stop}")
            continue
        tensors[name] = (stored, shape, start, stop)
        spans.append((start, stop, name))
    spans.sort()
    end = 0
    for start, stop, name in spans:
        if start != end and len(problems.lines) < MOST_LISTED:
            problems.add(f"tensor {name!r} begins at byte {start}, expected {end}: a hole or an overlap")
        end = stop
    if end != room and not problems:
        problems.add(f"the tensors need {end} bytes after the header, the file has {room}; it is cut short or padded")
    problems.raise_any(FormatError)
    return tensors
