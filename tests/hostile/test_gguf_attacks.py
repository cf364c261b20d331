"""Hand-made GGUF files that lie about themselves: each is refused with what is wrong, soon and cheaply."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lorastack import load
from lorastack.errors import FormatError
from tests.hostile.gguf_bytes import (
    ARRAY,
    DATA,
    F64,
    SOUND_KEYS,
    SOUND_TENSORS,
    STRING,
    U8,
    U32,
    U64,
    A,
    B,
    W,
    array,
    header,
    key,
    padded,
    string,
    tensor,
)
from tests.hostile.limits import refused


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "attack.gguf"


def put(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def test_the_file_that_all_attacks_start_from_is_sound(file: Path) -> None:
    lora = load(put(file, padded(header()) + DATA))
    np.testing.assert_array_equal(lora.adapters[W].a, A)
    np.testing.assert_array_equal(lora.adapters[W].dense(), 2 * B @ A)


def test_a_third_tensor_has_room(file: Path) -> None:
    lora = load(put(file, with_tensor(tensor("x_norm.weight", [16], 192))))
    assert lora.extras["norm"]["x_norm.weight"].shape == (16,)


def test_a_file_cut_short_at_any_byte_is_refused(file: Path) -> None:
    whole = padded(header()) + DATA
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(FormatError) as caught:
            load(file)
        assert str(file) in str(caught.value), length
        assert any(word in str(caught.value) for word in ("cut short", "damaged", "empty", "no safetensors")), length


BIG = 1 << 60
LAST = (1 << 64) - 1


def with_key(*keys: bytes) -> bytes:
    return padded(header(keys=[*SOUND_KEYS, *keys])) + DATA


def with_tensor(*tensors: bytes) -> bytes:
    """A third tensor, for which there is room at offset 192: what is wrong with it is not that."""
    return padded(header(tensors=[*SOUND_TENSORS, *tensors])) + padded(DATA) + bytes(128)


def aligned(kind: int, value: bytes) -> bytes:
    return with_key(key("general.alignment", kind, value))


ATTACKS: dict[str, tuple[bytes, str]] = {
    # counts
    "2**60 keys": (header(key_count=BIG), f"{BIG} keys in a file of"),
    "2**64-1 keys": (header(key_count=LAST), f"{LAST} keys"),
    "2**60 tensors": (header(tensor_count=BIG), f"{BIG} tensors in a file of"),
    "2**64-1 tensors": (header(tensor_count=LAST), f"{LAST} tensors"),
    "keys without end that are there": (header(keys=[key(f"{n:x}", U8, b"1") for n in range(9999)]), "9999 keys"),
    "one key too many": (padded(header(key_count=5)) + DATA, "damaged"),
    "one key too few": (padded(header(key_count=3)) + DATA, "dimensions"),
    "one tensor too many": (padded(header(tensor_count=3)) + DATA, "cut short"),
    # strings
    "a key of 2**63 bytes": (with_key(string("x", 1 << 63) + struct.pack("<I", U8)), f"needs {1 << 63} bytes"),
    "a key of 2**64-1 bytes": (with_key(string("x", LAST)), f"needs {LAST} bytes"),
    "a value of 2**63 bytes": (with_key(key("x", STRING, string("x", 1 << 63))), f"needs {1 << 63} bytes"),
    "a tensor's name of 2**63 bytes": (with_tensor(string("x", 1 << 63)), f"needs {1 << 63} bytes"),
    "a key that is no text": (with_key(key(b"\xff\xfe", U8, b"1")), "a key at byte"),
    "a value that is no text": (with_key(key("x", STRING, string(b"a\xc3(b"))), "the value of key 'x' at byte"),
    "a value in an array that is no text": (
        with_key(key("x", ARRAY, array(STRING, 2, string("a") + string(b"\x80")))),
        "a value of key 'x' at byte",
    ),
    "a tensor's name that is no text": (with_tensor(tensor(b"\xf8\x88", [1], 192)), "a tensor's name at byte"),
    # arrays
    "2**60 bytes in an array": (with_key(key("x", ARRAY, array(U8, BIG))), f"needs {BIG} bytes"),
    "2**61 numbers whose bytes pass 2**64": (with_key(key("x", ARRAY, array(F64, 1 << 61))), f"needs {1 << 64} bytes"),
    "2**60 strings": (with_key(key("x", ARRAY, array(STRING, BIG))), f"{BIG} strings in"),
    "2**64-1 strings": (with_key(key("x", ARRAY, array(STRING, LAST))), f"{LAST} strings in"),
    "a string of 2**63 bytes in an array": (
        with_key(key("x", ARRAY, array(STRING, 1, string("x", 1 << 63)))),
        f"needs {1 << 63} bytes",
    ),
    "more elements than any adapter has": (
        with_key(key("x", ARRAY, array(U8, 50_000, bytes(50_000)))),
        "arrays of 50000 elements by key 'x', at most 32768",
    ),
    "more elements in many arrays": (
        with_key(*(key(f"x{n}", ARRAY, array(U8, 9999, bytes(9999))) for n in range(4))),
        "arrays of 39996 elements by key 'x3'",
    ),
    "more strings than any adapter has": (
        with_key(key("x", ARRAY, array(STRING, 40_000, string("") * 40_000))),
        "arrays of 40000 elements",
    ),
    "an array of arrays": (with_key(key("x", ARRAY, array(ARRAY, 1, array(U8, 1, b"1")))), "an array of type 9"),
    "arrays nested without end": (with_key(key("x", ARRAY, array(ARRAY, 1) * 10_000)), "an array of type 9"),
    "an array of a type that is none": (with_key(key("x", ARRAY, array(13, 1, bytes(8)))), "an array of type 13"),
    "a key of a type that is none": (with_key(key("x", 13, bytes(8))), "key 'x' has type 13"),
    "a key of type 2**32-1": (with_key(key("x", (1 << 32) - 1, bytes(8))), f"has type {(1 << 32) - 1}"),
    # dimensions
    "5 dimensions": (with_tensor(tensor("x_norm.weight", [1] * 5, 192)), "has 5 dimensions, GGUF has up to 4"),
    "2**32-1 dimensions": (with_tensor(tensor("x", [1], 192, count=(1 << 32) - 1)), "4294967295 dimensions"),
    "dimensions whose product is 2**64": (
        with_tensor(tensor("x_norm.weight", [1 << 32, 1 << 32], 192)),
        "it is cut short",
    ),
    "dimensions whose product wraps round to 2": (
        with_tensor(tensor("x_norm.weight", [(1 << 63) + 1, 2], 192)),
        "it is cut short",
    ),
    "dimensions whose bytes wrap round to 4": (
        with_tensor(tensor("x_norm.weight", [(1 << 62) + 1], 192)),
        "it is cut short",
    ),
    "a dimension of 2**64-1": (with_tensor(tensor("x_norm.weight", [LAST], 192)), "it is cut short"),
    "no elements in 2**63 columns": (with_tensor(tensor("x_norm.weight", [0, 1 << 63], 192)), "cannot read it"),
    "no elements in 2**62 columns": (with_tensor(tensor("x_norm.weight", [1 << 62, 0], 192)), "cannot read it"),
    "rows that fill no block": (
        with_tensor(tensor("x_norm.weight", [33], 192, kind=8)),
        "tensor 'x_norm.weight': rows of 33 do not fill blocks of 32",
    ),
    "a quantised tensor without dimensions": (
        with_tensor(tensor("x_norm.weight", [], 192, kind=8)),
        "damaged",
    ),
    # offsets
    "an offset past the end": (with_tensor(tensor("x_norm.weight", [1], 1 << 20)), "it is cut short"),
    "an offset of 2**63": (with_tensor(tensor("x_norm.weight", [1], 1 << 63)), "it is cut short"),
    "an offset that wraps round with the size": (
        with_tensor(tensor("x_norm.weight", [16], (1 << 64) - 32)),
        "cut short",
    ),
    "one byte past the end": (padded(header()) + DATA[:-1], "it is cut short"),
    "two tensors in one place": (
        padded(header(tensors=[SOUND_TENSORS[0], tensor(f"{W}.lora_b", [4, 5], 0)])) + DATA,
        f"tensors '{W}.lora_b' and '{W}.lora_a' overlap",
    ),
    "a tensor inside another": (with_tensor(tensor("x_norm.weight", [1], 32)), f"tensors '{W}.lora_a' and 'x_norm.w"),
    "a tensor that ends in the next": (
        padded(header(tensors=[tensor(f"{W}.lora_a", [6, 4], 0), tensor(f"{W}.lora_b", [4, 5], 64)])) + DATA,
        "overlap",
    ),
    "a tensor that begins nowhere": (
        with_tensor(tensor("x_norm.weight", [1], 177)),
        "begins at 177, expected a multiple",
    ),
    # alignment
    "alignment 0": (aligned(U32, struct.pack("<I", 0)), "general.alignment is 0, expected a power of two"),
    "alignment 3": (aligned(U32, struct.pack("<I", 3)), "general.alignment is 3"),
    "alignment 2**31": (aligned(U32, struct.pack("<I", 1 << 31)), "it is cut short"),
    "alignment 2**32-1": (aligned(U32, struct.pack("<I", (1 << 32) - 1)), "general.alignment is 4294967295"),
    "alignment of another type": (aligned(U64, struct.pack("<Q", 32)), "general.alignment"),
    "alignment as text": (aligned(STRING, string("32")), "general.alignment"),
    # twins
    "a key twice": (with_key(SOUND_KEYS[3]), "key 'adapter.lora.alpha' appears twice"),
    "alignment twice": (
        with_key(*[key("general.alignment", U32, struct.pack("<I", 32))] * 2),
        "key 'general.alignment' appears twice",
    ),
    "the reader's own key": (with_key(key("GGUF.version", U8, b"1")), "GGUF.version"),
    "a tensor twice": (
        with_tensor(tensor(f"{W}.lora_a", [6, 4], 192)),
        f"tensor '{W}.lora_a' appears twice",
    ),
    # types
    "a type that was taken back": (with_tensor(tensor("x_norm.weight", [32], 192, kind=4)), "has type 4, which"),
    "a type that is none": (with_tensor(tensor("x_norm.weight", [1], 192, kind=9999)), "has type 9999, which"),
    "type 2**32-1": (with_tensor(tensor("x_norm.weight", [1], 192, kind=(1 << 32) - 1)), "has type 4294967295"),
    # the first bytes
    "another magic": (header(magic=b"GGML"), "safetensors"),
    "the magic alone": (b"GGUF", "4 bytes are too few for a GGUF file"),
    "23 bytes": (header()[:23], "23 bytes are too few"),
    "version 0": (header(version=0) + DATA, "GGUF version"),
    "version 4": (header(version=4) + DATA, "GGUF version 4, versions 2 and 3 are read"),
    "the other byte order, in the version alone": (header(version=3 << 24) + DATA, "damaged"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_lies_is_refused_with_what_is_wrong(file: Path, attack: str) -> None:
    data, said = ATTACKS[attack]
    error = refused(put(file, data))
    assert said in str(error)
    assert str(file) in str(error)


@pytest.mark.parametrize("value", [b"", b"G", b"GGUF" + bytes(20), b"GGUF" + b"\xff" * 60, b"\xff" * 200, bytes(200)])
def test_bytes_that_are_no_file_are_refused(file: Path, value: bytes) -> None:
    assert str(file) in str(refused(put(file, value)))


def test_tensors_without_end_cost_what_the_file_is_long(file: Path) -> None:
    tensors = [tensor(f"{n:x}", [0], 0) for n in range(2_000)]
    error = refused(put(file, padded(header(tensors=tensors))))
    assert len(error.problems) == 2_000


def test_one_error_lists_every_lie(file: Path) -> None:
    keys = [*SOUND_KEYS, SOUND_KEYS[0], key("general.alignment", U32, struct.pack("<I", 7))]
    tensors = [
        *SOUND_TENSORS,
        tensor("one_norm.weight", [1], 32),
        tensor("two_norm.weight", [1 << 40], 192),
        tensor("three_norm.weight", [1], 1),
        tensor("four_norm.weight", [1], 192, kind=77),
    ]
    error = refused(put(file, padded(header(keys, tensors)) + DATA))
    text = str(error)
    for words in (
        "key 'general.architecture' appears twice",
        "general.alignment is 7",
        f"tensors '{W}.lora_a' and 'one_norm.weight' overlap",
        "tensor 'two_norm.weight' ends at byte",
        "tensor 'three_norm.weight' begins at 1, expected a multiple of 32",
        f"tensors '{W}.lora_a' and 'three_norm.weight' overlap",
        "tensor 'four_norm.weight' has type 77",
    ):
        assert words in text
    assert len(error.problems) == 7
    assert "7 problems" in text
