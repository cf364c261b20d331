"""What torch.save wrote, looked through before torch reads it: which names it asks for, and what it would take.

``torch.load(weights_only=True)`` runs no code of a file's own, but lets it ask for a ``bytearray`` of any size, for
keys that all have one hash, and for tensors with methods of their own. A state dict needs none of these.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from lorastack.errors import FormatError, shown
from lorastack.formats.opened import OpenedFile

#: DeepSeek's experts one by one are 94,000 tensors, in a pickle of 14 MB.
MAX_PICKLE = 1 << 25
#: A file without an archive begins with five pickles: a mark, a version, sizes of types, the state dict, its storages.
_OLD_PICKLES = 5
_STORAGES = (
    "Double Float Half BFloat16 Long Int Short Char Byte Bool Untyped Typed ComplexFloat ComplexDouble "
    "QInt8 QUInt8 QInt32 Float8_e4m3fn Float8_e5m2".split()
)
_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128 "
    "int64 int32 int16 int8 uint8 bool".split()
)
_ORDERED = "collections OrderedDict"
#: The names that the state dicts of models ask for.
_ASKED = frozenset(
    [_ORDERED, "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter",
     "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_sparse_tensor",
     "torch._utils _rebuild_meta_tensor_no_storage",
     "torch Size", "torch device", "torch.serialization _get_layout"]
    + [f"{module} {kind}Storage" for module in ("torch", "torch.storage") for kind in _STORAGES]
    + [f"torch {name}" for name in _DTYPES]
)  # fmt: skip
#: An object takes about this much, and may take so much for each byte of the pickle.
_EACH, _TIMES, _FREE = 100, 10, 48 << 20
_MARK, _TEXT, _SMALL, _DICT, _EMPTY, _OTHER = "mark", "text", "small number", "dict", "empty tuple", "other"
_TEXTS = (pickletools.pyunicode, pickletools.pystring, pickletools.pybytes_or_str)
_SMALL_NUMBERS = frozenset("BININT BININT1 BININT2".split())
_GETS = frozenset("GET BINGET LONG_BINGET".split())
_PUTS = frozenset("PUT BINPUT LONG_BINPUT".split())


def check_pickles(file: OpenedFile) -> None:
    """Raise FormatError unless the file asks for nothing but what a state dict is made of."""
    with file.stream() as stream, warnings.catch_warnings(action="ignore"):  # of escapes in texts that it may hold
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            for _ in range(_OLD_PICKLES):
                _check(stream, file.size, file)
            return
        with zipfile.ZipFile(stream) as parts:
            every = parts.infolist()
            # Torch stores its parts as they are, but would unpack others.
            if sum(part.file_size for part in every) > 4 * file.size:
                needed = sum(part.file_size for part in every)
                raise FormatError(
                    f"{file}: its tensors need {needed} bytes, the file has {file.size}; save the adapter again"
                )
            pickles = [part for part in every if part.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or len({part.filename for part in every}) < len(every):
                raise FormatError(f"{file}: it is an archive, but not as torch.save writes one; save the adapter again")
            if pickles[0].file_size > MAX_PICKLE:
                raise FormatError(
                    f"{file}: its pickle has {pickles[0].file_size} bytes, at most {MAX_PICKLE} are read; "
                    "save the adapter as safetensors"
                )
            with parts.open(pickles[0]) as inner:
                _check(inner, pickles[0].file_size, file)  # type: ignore[arg-type]


def _check(stream: BinaryIO, size: int, file: OpenedFile) -> None:
    """Follow one pickle, keeping of each object only what kind it is."""
    stack: list[str] = []
    memo: dict[int, str] = {}
    left = _TIMES * min(size, MAX_PICKLE) + _FREE
    for opcode, value in _opcodes(stream):
        name = opcode.name
        taken = _take(stack, opcode)
        kind = _OTHER
        if name in _PUTS or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else int(value)] = stack[-1]
            continue
        if name in _GETS:
            kind = memo[int(value)]
        elif name == "GLOBAL":
            kind = _asked(value, file)
        elif name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "BYTEARRAY8"):
            raise FormatError(f"{file}: its pickle has {name}, which no state dict needs; save the adapter again")
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            _check_keys(taken[::2] if name == "DICT" else taken[1::2], file)
            kind = _DICT
        elif name == "REDUCE":
            if taken[0] == _ORDERED and taken[1] != _EMPTY:
                raise FormatError(f"{file}: its pickle fills a dict in a way that torch.save does not; save it again")
            kind = _DICT if taken[0] == _ORDERED else _OTHER
        elif name == "BUILD":
            if taken[0] != _DICT:
                raise FormatError(f"{file}: its pickle gives a tensor a state of its own; save the adapter again")
            kind = _DICT
        elif opcode.stack_after:
            kind = _kind(name, opcode)
        if opcode.stack_after:
            stack += [kind] * len(opcode.stack_after)
            if kind != _SMALL and name not in _GETS:
                left -= _EACH
        if left < 0:
            raise FormatError(f"{file}: its pickle makes far more objects than a state dict has; save it again")


def _opcodes(stream: BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for opcode, value, _ in pickletools.genops(stream):
        yield opcode, value


def _take(stack: list[str], opcode: pickletools.OpcodeInfo) -> list[str]:
    """What the opcode takes from the stack, the mark left out."""
    before = opcode.stack_before
    if pickletools.markobject not in before:
        first = len(stack) - len(before)
        if first < 0:
            raise ValueError("the stack is empty")
        taken = stack[first:]
        del stack[first:]
        return taken
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    lower = before.index(pickletools.markobject)
    taken = stack[at - lower : at] + stack[at + 1 :]
    del stack[at - lower :]
    return taken


def _kind(name: str, opcode: pickletools.OpcodeInfo) -> str:
    if name == "MARK":
        return _MARK
    if name in _SMALL_NUMBERS:
        return _SMALL
    if name == "EMPTY_DICT":
        return _DICT
    if name == "EMPTY_TUPLE":
        return _EMPTY
    return _TEXT if opcode.stack_after[0] in _TEXTS else _OTHER


def _asked(value: str, file: OpenedFile) -> str:
    if value not in _ASKED:
        raise FormatError(
            f"{file}: torch.load(weights_only=True) refuses it, or may be misled by it: it asks to run "
            f"{shown(value.replace(' ', '.'))[1:-1]}, which is no part of a state dict of tensors, and is not run; "
            "save the adapter again with PEFT, as safetensors"
        ) from None
    return value


def _check_keys(keys: list[str], file: OpenedFile) -> None:
    # Numbers, and tuples of them, can be chosen so that all have one hash; texts cannot.
    if not set(keys) <= {_TEXT, _SMALL}:
        raise FormatError(f"{file}: its pickle has keys that are neither texts nor small numbers; save it again")
