"""Walk a GGUF header and check every length, count and offset, before ``gguf.GGUFReader`` believes them.

The reader slices a mapped file by what the header says: a count of 2**60 elements past the end of the
file keeps it busy for ever, and nothing there looks for tensors that overlap.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorastack.errors import FormatError, Problems

#: Bytes of a value by its GGUF type number; 8 is a string, 9 an array.
_SCALAR = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _U32 = 8, 9, 4
#: The reader keeps several objects for each key and each element of an array; no adapter has use for more.
MAX_ELEMENTS = 1 << 15
MAX_KEYS = 1 << 12


class _Cursor:
    """Reads forward through a header and refuses to leave the file."""

    def __init__(self, data: memoryview, label: str) -> None:
        self.data, self.label, self.at, self.order = data, label, 0, "<"

    def number(self, code: str) -> int:
        size = struct.calcsize(code)
        start = self.skip(size)
        return struct.unpack_from(self.order + code, self.data, start)[0]

    def string(self, what: str) -> str:
        start = self.skip(self.number("Q"))
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.label}: {what} at byte {start} is not UTF-8; the file is damaged") from error

    def skip(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise FormatError(
                f"{self.label}: the header needs {size} bytes at byte {start}, the file has {len(self.data)}; "
                "it is cut short or damaged, fetch it again"
            )
        return start


def check_header(data: memoryview, label: str, max_elements: int = MAX_ELEMENTS) -> None:
    """Raise FormatError unless the header is sound and every tensor lies inside the file, apart from others."""
    cursor = _Cursor(data, label)
    if bytes(data[:4]) != b"GGUF":
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
        if count * least > len(data):
            raise FormatError(f"{label}: {count} {what} in a file of {len(data)} bytes; it is damaged")
    if key_count > MAX_KEYS:
        raise FormatError(f"{label}: {key_count} keys, at most {MAX_KEYS} are read; no GGUF file needs so many")
    problems = Problems(f"cannot read {label}")
    alignment = _check_keys(cursor, key_count, max_elements, problems)
    _check_tensors(cursor, tensor_count, alignment, problems)
    problems.raise_any(FormatError)


def _check_keys(cursor: _Cursor, count: int, max_elements: int, problems: Problems) -> int:
    """Pass over the keys; returns the alignment."""
    alignment = 32
    seen: set[str] = set()
    elements = 0
    for _ in range(count):
        key = cursor.string("a key")
        if key in seen:
            problems.add(f"key {key!r} appears twice")
        seen.add(key)
        kind = cursor.number("I")
        if key == "general.alignment" and kind == _U32:
            alignment = cursor.number("I")
            if alignment == 0 or alignment & (alignment - 1):
                problems.add(f"general.alignment is {alignment}, expected a power of two")
                alignment = 32
        elif kind in _SCALAR:
            cursor.skip(_SCALAR[kind])
        elif kind == _STRING:
            cursor.string(f"the value of key {key!r}")
        elif kind == _ARRAY:
            elements += _check_array(cursor, key)
            if elements > max_elements:
                raise FormatError(
                    f"{cursor.label}: arrays of {elements} elements by key {key!r}, at most {max_elements} are "
                    "read; an adapter carries no such lists"
                )
        else:
            raise FormatError(f"{cursor.label}: key {key!r} has type {kind}, GGUF has types 0 to 12; it is damaged")
    return alignment


def _check_array(cursor: _Cursor, key: str) -> int:
    inner, length = cursor.number("I"), cursor.number("Q")
    if inner in _SCALAR:
        cursor.skip(length * _SCALAR[inner])
    elif inner == _STRING:
        if length * 8 > len(cursor.data):
            raise FormatError(f"{cursor.label}: key {key!r} has {length} strings in {len(cursor.data)} bytes")
        tokens = key.startswith("tokenizer.")  # some vocabularies hold bytes that are no text; nobody here reads them
        for _ in range(length):
            if tokens:
                cursor.skip(cursor.number("Q"))
            else:
                cursor.string(f"a value of key {key!r}")
    else:
        raise FormatError(f"{cursor.label}: key {key!r} is an array of type {inner}, which GGUF does not allow")
    return length


def _check_tensors(cursor: _Cursor, count: int, alignment: int, problems: Problems) -> None:
    spans: list[tuple[int, int, str]] = []
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.string("a tensor's name")
        if name in seen:
            problems.add(f"tensor {name!r} appears twice")
        seen.add(name)
        dims_count = cursor.number("I")
        if dims_count > 4:
            raise FormatError(f"{cursor.label}: tensor {name!r} has {dims_count} dimensions, GGUF has up to 4")
        shape = [cursor.number("Q") for _ in range(dims_count)]
        kind, offset = cursor.number("I"), cursor.number("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            problems.add(f"tensor {name!r} has type {kind}, which this version of gguf does not know")
            continue
        if shape and shape[0] % block:
            problems.add(f"tensor {name!r}: rows of {shape[0]} do not fill blocks of {block}")
        if offset % alignment:
            problems.add(f"tensor {name!r} begins at {offset}, expected a multiple of {alignment}")
        spans.append((offset, offset + math.prod(shape) // block * block_bytes, name))
    start = -(-cursor.at // alignment) * alignment
    room = max(len(cursor.data) - start, 0)
    end, before = 0, ""
    for low, high, name in sorted(spans):
        if high > room:
            problems.add(
                f"tensor {name!r} ends at byte {start + high}, the file has {len(cursor.data)}; it is cut short"
            )
        if low < end and high > low:
            problems.add(f"tensors {before!r} and {name!r} overlap")
        if high > end:
            end, before = high, name
