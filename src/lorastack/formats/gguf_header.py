"""Walk a GGUF header, checking every length, count and offset: its keys, and where its tensors lie.

``gguf.GGUFReader`` opens a path by itself, maps the file and believes what the header says: a count of 2**60 elements
keeps it busy for ever, nothing there looks for tensors that overlap, and each tensor costs it thousands of bytes.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.limits import MAX_NAME, MAX_TENSORS, MOST_LISTED

#: ``struct``'s letter for a value by its GGUF type number; 8 is a string, 9 an array.
_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _U32 = 8, 9, 4
#: An array becomes a list of objects; no adapter has use for a long one.
MAX_ELEMENTS = 1 << 15
MAX_KEYS = 1 << 12
#: What the format itself allows.
_MAX_KEY_NAME = (1 << 16) - 1
#: How much is read of a file at first; headers of adapters are shorter.
_WINDOW = 1 << 16
#: The types that NumPy has, with its letters for them; others are bytes until they are dequantised.
PLAIN = {"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}


class Source(Protocol):
    """What a header and tensors are read from: an open file."""

    @property
    def size(self) -> int: ...
    def read(self, start: int, size: int) -> bytes: ...
    def array(self, start: int, size: int) -> np.ndarray: ...


class Field(NamedTuple):
    """The value of a key, with its type and, for an array, that of its elements."""

    value: Any
    types: list[GGUFValueType]

    def contents(self) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its place in the file; ``dims`` are in the file's order, the innermost first."""

    name: str
    tensor_type: GGMLQuantizationType
    dims: tuple[int, ...]
    start: int
    size: int
    header: Header

    @property
    def shape(self) -> np.ndarray:
        return np.array(self.dims, np.uint64)

    @property
    def data(self) -> np.ndarray:
        """The stored numbers, read into memory of their own; of packed types the bytes, row by row."""
        raw = self.header.source.array(self.start, self.size)
        shape, letters = self.dims[::-1], PLAIN.get(self.tensor_type.name)
        if letters is None:
            return raw.reshape(gguf.quants.quant_shape_to_byte_shape(shape or (1,), self.tensor_type))
        return raw.view(self.header.order + letters).reshape(shape)


@dataclass(eq=False)
class Header:
    """What a GGUF file says of itself: ``fields`` by key and ``tensors``, whose data is read when asked for."""

    source: Source
    order: str
    fields: dict[str, Field]
    tensors: list[Tensor]
    version: int = 3
    alignment: int = 32
    #: Key -> the bytes of the file that are its name, its type and its value.
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def path(self) -> Path:
        """Where it was read from, for messages."""
        return getattr(self.source, "path", Path())

    @property
    def swapped(self) -> bool:
        """Whether the file is in the other byte order than this machine."""
        return self.order != ("<" if sys.byteorder == "little" else ">")


class _Cursor:
    """Reads forward through a header and refuses to leave the file."""

    def __init__(self, source: Source, label: str) -> None:
        self.source, self.label, self.at, self.order = source, label, 0, "<"
        self.room = source.size
        self.data = source.read(0, min(_WINDOW, self.room))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def numbers(self, codes: str) -> tuple[Any, ...]:
        codes = self.order + codes
        start = self.skip(struct.calcsize(codes))
        return struct.unpack_from(codes, self.data, start)

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("Q")
        self._check_room(length)
        if most is not None and length > most:
            raise FormatError(f"{self.label}: {what} at byte {self.at} has {length} bytes, at most {most} are read")
        start = self.skip(length)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.label}: {what} at byte {start} is not UTF-8; the file is damaged") from error

    def skip(self, size: int) -> int:
        self._check_room(size)
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            more = min(max(self.at, 2 * len(self.data)), self.room) - len(self.data)
            self.data += self.source.read(len(self.data), more)
        return start

    def _check_room(self, size: int) -> None:
        if self.at + size > self.room:
            raise FormatError(
                f"{self.label}: the header needs {size} bytes at byte {self.at}, the file has {self.room}; "
                "it is cut short or damaged, fetch it again"
            )


def read_header(source: Source, label: str, max_elements: int = MAX_ELEMENTS) -> Header:
    """The header, once it is sound and every tensor lies inside the file, apart from others; else FormatError."""
    cursor = _Cursor(source, label)
    if cursor.data[:4] != b"GGUF":
        raise FormatError(f"{label}: it does not begin with GGUF")
    cursor.skip(4)
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        cursor.order, cursor.at = ">", 4
        version = cursor.number("I")
    if version not in (2, 3):
        raise FormatError(f"{label}: GGUF version {version}, versions 2 and 3 are read; convert it again")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    # A key takes 13 bytes or more and a tensor 24: a count that cannot be true is refused before any loop.
    for what, count, least in (("keys", key_count, 13), ("tensors", tensor_count, 24)):
        if count * least > cursor.room:
            raise FormatError(f"{label}: {count} {what} in a file of {cursor.room} bytes; it is damaged")
    for what, count, most in (("keys", key_count, MAX_KEYS), ("tensors", tensor_count, MAX_TENSORS)):
        if count > most:
            raise FormatError(f"{label}: {count} {what}, at most {most} are read; no GGUF file needs so many")
    problems = Problems(f"cannot read {label}")
    header = Header(source, cursor.order, {}, [], version)
    header.alignment = _read_keys(cursor, key_count, max_elements, header, problems)
    _read_tensors(cursor, tensor_count, header.alignment, header, problems)
    problems.raise_any(FormatError)
    return header


def _read_keys(cursor: _Cursor, count: int, max_elements: int, header: Header, problems: Problems) -> int:
    """Fill the header's ``fields`` and ``spans``; returns the alignment."""
    fields = header.fields
    alignment = 32
    elements = 0
    for _ in range(count):
        start = cursor.at
        key = cursor.string("a key", _MAX_KEY_NAME)
        if key in fields and len(problems.lines) < MOST_LISTED:
            problems.add(f"key {shown(key)} appears twice")
        kind = cursor.number("I")
        types = [GGUFValueType(kind)] if kind in _SCALAR or kind in (_STRING, _ARRAY) else []
        if kind in _SCALAR:
            value = cursor.number(_SCALAR[kind])
        elif kind == _STRING:
            value = cursor.string(f"the value of key {shown(key)}")
        elif kind == _ARRAY:
            inner, length = cursor.number("I"), cursor.number("Q")
            elements += length
            if elements > max_elements and _array_fits(cursor, inner, length):
                raise FormatError(
                    f"{cursor.label}: arrays of {elements} elements by key {shown(key)}, at most {max_elements} are "
                    "read; an adapter carries no such lists"
                )
            value = _read_array(cursor, key, inner, length)
            types.append(GGUFValueType(inner))
        else:
            raise FormatError(
                f"{cursor.label}: key {shown(key)} has type {kind}, GGUF has types 0 to 12; it is damaged"
            )
        if key.startswith("GGUF."):
            problems.add(f"key {shown(key)} is one of the gguf package's own, which then cannot read the file")
        if key == "general.alignment" and kind != _U32:
            problems.add(f"general.alignment has type {types[0].name}, expected UINT32")
        elif key == "general.alignment":
            alignment = value
            if alignment == 0 or alignment & (alignment - 1):
                problems.add(f"general.alignment is {alignment}, expected a power of two")
                alignment = 32
        fields[key] = Field(value, types)
        header.spans[key] = start, cursor.at
    return alignment


def _array_fits(cursor: _Cursor, inner: int, length: int) -> bool:
    """Whether an array may be in the file at all; if not, `_read_array` says so."""
    least = struct.calcsize("<" + _SCALAR[inner]) if inner in _SCALAR else 8
    return cursor.at + length * least <= cursor.room


def _read_array(cursor: _Cursor, key: str, inner: int, length: int) -> list[Any]:
    # Some vocabularies hold bytes that are no text, and nobody here reads them: they are passed over.
    tokens = key.startswith("tokenizer.")
    if inner in _SCALAR:
        dtype = np.dtype(cursor.order + _SCALAR[inner])
        start = cursor.skip(length * dtype.itemsize)
        return [] if tokens else np.frombuffer(cursor.data, dtype, length, start).tolist()
    if inner != _STRING:
        raise FormatError(f"{cursor.label}: key {shown(key)} is an array of type {inner}, which GGUF does not allow")
    if length * 8 > cursor.room:
        raise FormatError(f"{cursor.label}: key {shown(key)} has {length} strings in {cursor.room} bytes")
    if not tokens:
        return [cursor.string(f"a value of key {shown(key)}") for _ in range(length)]
    for _ in range(length):
        cursor.skip(cursor.number("Q"))
    return []


def _read_tensors(cursor: _Cursor, count: int, alignment: int, header: Header, problems: Problems) -> None:
    found: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]] = []
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.string("a tensor's name", MAX_NAME)
        before = len(problems.lines)
        if name in seen:
            problems.add(f"tensor {shown(name)} appears twice")
        seen.add(name)
        dims_count = cursor.number("I")
        if dims_count > 4:
            raise FormatError(f"{cursor.label}: tensor {shown(name)} has {dims_count} dimensions, GGUF has up to 4")
        *dims, kind, offset = cursor.numbers(f"{dims_count}QIQ")
        try:
            stored = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[stored]
        except (ValueError, KeyError):
            problems.add(f"tensor {shown(name)} has type {kind}, which this version of gguf does not know")
        else:
            if (dims[0] if dims else 1) % block:
                rows = f"rows of {dims[0]} do" if dims else "a single number does"
                problems.add(f"tensor {shown(name)}: {rows} not fill blocks of {block}; the file is damaged")
            if offset % alignment:
                problems.add(f"tensor {shown(name)} begins at {offset}, expected a multiple of {alignment}")
            # An array without elements can still have more dimensions than NumPy can multiply.
            if math.prod(n or 1 for n in dims) >= 1 << 60:
                problems.add(f"tensor {shown(name)} has the dimensions {dims}; NumPy cannot read it")
            found.append((name, stored, tuple(dims), offset, math.prod(dims) // block * block_bytes))
        if before < MOST_LISTED <= len(problems.lines):
            problems.add("and so on; the file is damaged")
            return
    start = -(-cursor.at // alignment) * alignment
    _check_places(found, start, cursor.room, problems)
    header.tensors += [Tensor(name, kind, dims, start + at, size, header) for name, kind, dims, at, size in found]


def _check_places(
    found: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]], start: int, size: int, problems: Problems
) -> None:
    """Note the tensors that end behind the file, and those that lie over others."""
    room = max(size - start, 0)
    end, before = 0, ""
    for name, _, _, low, length in sorted(found, key=lambda one: (one[3], one[3] + one[4], one[0])):
        high = low + length
        if high > room:
            problems.add(f"tensor {shown(name)} ends at byte {start + high}, the file has {size}; it is cut short")
        if low < end and high > low:
            problems.add(f"tensors {shown(before)} and {shown(name)} overlap")
        if high > end:
            end, before = high, name
        if len(problems.lines) >= MOST_LISTED:
            problems.add("and so on; the file is damaged")
            return
