"""Hand-made safetensors files that lie about themselves: each is refused with what is wrong, soon and cheaply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from lorastack import load
from lorastack.errors import FormatError
from tests.hostile.limits import refused

KEY_A, KEY_B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
A, B = np.arange(24, dtype="<f4").reshape(4, 6), np.arange(20, dtype="<f4").reshape(5, 4)
DATA = A.tobytes() + B.tobytes()
ENTRY_A = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}
ENTRY_B = {"dtype": "F32", "shape": [5, 4], "data_offsets": [96, 176]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    return tmp_path


def raw(head: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return (len(head) if length is None else length).to_bytes(8, "little") + head + data


def sound(**more: Any) -> bytes:
    return raw(json.dumps({KEY_A: ENTRY_A, KEY_B: ENTRY_B, **more}).encode())


def a_is(**fields: Any) -> bytes:
    """The sound file with other fields in the entry of lora_A."""
    return raw(json.dumps({KEY_A: {**ENTRY_A, **fields}, KEY_B: ENTRY_B}).encode())


def third(**fields: Any) -> bytes:
    """The sound file with a third tensor, a number by itself unless ``fields`` say other."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [176, 180], **fields}
    return raw(
        json.dumps({KEY_A: ENTRY_A, KEY_B: ENTRY_B, "base_model.model.head.weight": entry}).encode(), DATA + bytes(4)
    )


def put(folder: Path, data: bytes) -> Path:
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return b'{"x": ' + opening.encode() * depth + b"1" + closing.encode() * depth + b"}"


def test_the_file_that_all_attacks_start_from_is_sound(folder: Path) -> None:
    lora = load(put(folder, sound(__metadata__={"format": "pt"})))
    np.testing.assert_array_equal(lora.adapters["q_proj.weight"].dense(), 2 * B @ A)
    assert load(put(folder, sound(__metadata__=None))).rank == 4, "as MLX writes it"
    assert load(put(folder, sound(__metadata__={"é": '"\u2028\n\\ data_offsets'}))).rank == 4
    lora = load(put(folder, third()))
    np.testing.assert_array_equal(lora.extras["modules_to_save"]["head.weight"].array, [0])


def test_a_file_cut_short_at_any_byte_is_refused(folder: Path) -> None:
    whole = sound()
    for length in range(len(whole)):
        put(folder, whole[:length])
        with pytest.raises(FormatError, match=r"adapter_model\.safetensors") as caught:
            load(folder)
        assert any(word in str(caught.value) for word in ("cut short", "no JSON", "empty")), length


HEAD = json.dumps({KEY_A: ENTRY_A, KEY_B: ENTRY_B}).encode()
SIZE = 8 + len(HEAD) + len(DATA)
HUGE = 1 << 63

ATTACKS: dict[str, tuple[bytes, str]] = {
    # the length of the header
    "an empty file": (b"", "it is empty"),
    "a length and no header": (raw(b"", b""), "the file has 8"),
    "a header of no bytes": (raw(HEAD, length=0), "its header is no JSON"),
    "a header of one byte": (raw(HEAD, length=1), "its header is no JSON"),
    "a header one byte short": (raw(HEAD, length=len(HEAD) - 1), "its header is no JSON"),
    "a header one byte long": (raw(HEAD, length=len(HEAD) + 1), "its header is no JSON"),
    "a header to the end of the file and one byte": (
        raw(HEAD, length=SIZE - 7),
        f"its header has {SIZE - 7} bytes, the file has {SIZE}",
    ),
    "a header of 2**63 bytes": (raw(HEAD, length=HUGE), f"its header has {HUGE} bytes"),
    "a header of 2**64-1 bytes": (raw(HEAD, length=(1 << 64) - 1), f"its header has {(1 << 64) - 1} bytes"),
    # what is no JSON object
    "no JSON": (raw(b"what a day"), "its header is no JSON"),
    "JSON and a rest": (raw(HEAD + b"x"), "its header is no JSON"),
    "two objects": (raw(HEAD + HEAD), "its header is no JSON"),
    "a byte order mark": (raw(b"\xef\xbb\xbf" + HEAD), "its header is no JSON"),
    "text in UTF-16": (raw(HEAD.decode().encode("utf-16")), "its header is no JSON"),
    "no UTF-8": (raw(HEAD.replace(b"q_proj", b"q_pr\xffj")), "its header is no JSON"),
    "half a surrogate pair": (raw(HEAD.replace(b"q_proj", b"\\ud800")), "its header is no JSON"),
    "a NUL in the JSON": (raw(b"\0" + HEAD), "its header is no JSON"),
    "a list": (raw(b"[" + HEAD + b"]"), "its header is no JSON object"),
    "null": (raw(b"null", b""), "its header is no JSON object"),
    "a number": (raw(b"12345678", b""), "its header is no JSON object"),
    "NaN": (raw(HEAD.replace(b"96]", b"NaN]")), "its header is no JSON"),
    "a number of 400 digits": (raw(HEAD.replace(b"[0,", b"[" + b"1" * 400 + b",")), "its header is no JSON"),
    # depth
    "lists nested 1000 deep": (raw(nested(1000)), "nested too deeply"),
    "objects nested 1000 deep": (raw(nested(1000, '{"data_offsets":', "}")), "nested too deeply"),
    "lists nested 100 000 deep": (raw(nested(100_000)), "its header is no JSON (depth limit exceeded"),
    "an entry nested 500 deep": (sound(x=json.loads("[" * 500 + "]" * 500)), "tensor 'x': its entry [[[[[[[...]]]]]]]"),
    # twins
    "a tensor twice": (
        raw(HEAD[:-1] + b", " + json.dumps({KEY_A: ENTRY_A}).encode()[1:]),
        f"['{KEY_A}'] appears twice in the header",
    ),
    "a tensor twice, the first spelt in another way": (
        raw(json.dumps({KEY_A: ENTRY_A}).encode().replace(b"data_", b"d\\u0061ta_")[:-1] + b", " + HEAD[1:]),
        f"['{KEY_A}'] appears twice in the header",
    ),
    "a tensor twice, its name spelt in another way": (
        raw(json.dumps({KEY_A.replace("q", "@"): ENTRY_A}).encode().replace(b"@", b"\\u0071")[:-1] + b", " + HEAD[1:]),
        f"['{KEY_A}'] appears twice in the header",
    ),
    "two offsets in one entry": (
        raw(HEAD.replace(b'"data_offsets": [0,', b'"data_offsets": [8, 9], "data_offsets": [0,')),
        "['data_offsets'] appears twice in the header",
    ),
    "a tensor twice, the first without offsets": (
        raw(json.dumps({KEY_A: {"dtype": "F32"}}).encode()[:-1] + b", " + HEAD[1:]),
        f"['{KEY_A}'] appears twice in the header",
    ),
    "a tensor twice, paid for by quotes in the metadata": (
        raw(
            b'{"__metadata__": {"x": "'
            + b"\\u0022" * 10
            + b'"}, '
            + json.dumps({KEY_A: ENTRY_A}).encode()[1:-1]
            + b", "
            + HEAD[1:]
        ),
        f"['{KEY_A}'] appears twice in the header",
    ),
    # metadata
    "metadata that is a list": (sound(__metadata__=["format", "pt"]), "__metadata__ in the header is no object"),
    "metadata that is text": (sound(__metadata__="pt"), "__metadata__ in the header is no object of texts"),
    "metadata that is an empty list": (sound(__metadata__=[]), "__metadata__ in the header is no object of texts"),
    "metadata nested 500 deep": (
        sound(__metadata__={"x": json.loads("[" * 500 + "]" * 500)}),
        "__metadata__ in the header is no object of texts",
    ),
    "metadata with a number": (sound(__metadata__={"format": 1}), "__metadata__ in the header is no object of texts"),
    # spans
    "a hole": (
        raw(json.dumps({KEY_A: ENTRY_A, KEY_B: {**ENTRY_B, "data_offsets": [100, 180]}}).encode(), DATA + bytes(4)),
        f"tensor '{KEY_B}' begins at byte 100, expected 96: a hole or an overlap",
    ),
    "a hole at the start": (
        raw(json.dumps({KEY_A: {**ENTRY_A, "data_offsets": [80, 176]}}).encode()),
        f"tensor '{KEY_A}' begins at byte 80, expected 0",
    ),
    "an overlap": (
        raw(json.dumps({KEY_A: ENTRY_A, KEY_B: {**ENTRY_B, "data_offsets": [92, 172]}}).encode(), DATA[:-4]),
        f"tensor '{KEY_B}' begins at byte 92, expected 96: a hole or an overlap",
    ),
    "two tensors in one place": (
        raw(json.dumps({KEY_A: ENTRY_A, KEY_B: ENTRY_A}).encode(), DATA[:96]),
        "begins at byte 0, expected 96",
    ),
    "a tensor that ends before it begins": (a_is(data_offsets=[96, 0]), "does not fill bytes 96 to 0"),
    "bytes left over": (raw(HEAD, DATA + b"\0"), "need 176 bytes after the header, the file has 177"),
    "a byte too few": (raw(HEAD, DATA[:-1]), "need 176 bytes after the header, the file has 175"),
    "tensors of no bytes and data": (
        raw(json.dumps({KEY_A: {"dtype": "F32", "shape": [0, 6], "data_offsets": [0, 0]}}).encode()),
        "need 0 bytes after the header, the file has 176",
    ),
    # offsets
    "a negative offset": (a_is(data_offsets=[-96, 0]), "does not fill bytes -96 to 0"),
    "a float offset": (a_is(data_offsets=[0.0, 96]), "does not fill bytes 0.0 to 96"),
    "a float end": (a_is(data_offsets=[0, 96.0]), "does not fill bytes 0 to 96.0"),
    "a bool offset": (a_is(data_offsets=[False, 96]), "does not fill bytes False to 96"),
    "an offset as text": (a_is(data_offsets=["0", "96"]), "does not fill bytes 0 to 96"),
    "an offset of null": (a_is(data_offsets=[None, 96]), "does not fill bytes None to 96"),
    "offsets of 2**64-1": (
        a_is(data_offsets=[(1 << 64) - 97, (1 << 64) - 1]),
        f"begins at byte {(1 << 64) - 97}, expected 176",
    ),
    "an end past 2**64": (a_is(data_offsets=[0, 1 << 70]), "does not fill bytes 0 to 1.18"),
    "one offset": (a_is(data_offsets=[96]), "has no known dtype, shape and data_offsets"),
    "three offsets": (a_is(data_offsets=[0, 48, 96]), "has no known dtype, shape and data_offsets"),
    "offsets that are no list": (a_is(data_offsets=96), "has no known dtype, shape and data_offsets"),
    "offsets as two letters": (a_is(data_offsets="09"), "does not fill bytes 0 to 9"),
    "no offsets": (raw(HEAD.replace(b"data_offsets", b"data_offset_", 1)), "no known dtype, shape and data_offsets"),
    # shapes
    "a negative dimension": (a_is(shape=[-4, -6]), "F32 of [-4, -6] does not fill bytes 0 to 96"),
    "a float dimension": (a_is(shape=[4.0, 6]), "F32 of [4.0, 6] does not fill"),
    "a bool dimension": (third(shape=[True]), "F32 of [True] does not fill"),
    "a dimension as text": (a_is(shape=["4", 6]), "F32 of ['4', 6] does not fill"),
    "a shape of null": (a_is(shape=None), "has no known dtype, shape and data_offsets"),
    "a shape as text": (a_is(shape="46"), "has no known dtype, shape and data_offsets"),
    "a number's shape as an empty text": (third(shape=""), "has no known dtype, shape and data_offsets"),
    "a number's shape as an empty object": (third(shape={}), "has no known dtype, shape and data_offsets"),
    "a shape of lists": (a_is(shape=[[4, 6]]), "F32 of [[4, 6]] does not fill"),
    "another shape": (a_is(shape=[4, 7]), "F32 of [4, 7] does not fill bytes 0 to 96"),
    "a dimension of 2**63": (a_is(shape=[HUGE, 6]), f"F32 of [{HUGE}, 6] does not fill"),
    "dimensions whose bytes wrap round to 96": (a_is(shape=[(1 << 62) + 4, 6]), "does not fill bytes 0 to 96"),
    "a dimension past 2**64": (a_is(shape=[1 << 70, 6]), "F32 of [1.18"),
    "no elements in 2**63 columns": (third(shape=[0, HUGE], data_offsets=[176, 176]), f"F32 of [0, {HUGE}] does not"),
    "no elements in 2**62 columns": (third(shape=[1 << 62, 0], data_offsets=[176, 176]), "does not fill"),
    "more dimensions than an array has": (third(shape=[1] * 70), "F32 of [1, 1, 1, 1, 1, 1, ...] does not fill"),
    "60 000 dimensions of 2**63": (third(shape=[HUGE] * 60_000), f"F32 of [{HUGE}, {HUGE}"),
    # types
    "a type that is none": (a_is(dtype="F33"), "has no known dtype, shape and data_offsets"),
    "a type in small letters": (a_is(dtype="f32"), "has no known dtype, shape and data_offsets"),
    "a type as a number": (a_is(dtype=32), "has no known dtype, shape and data_offsets"),
    "a type as a list": (a_is(dtype=["F32"]), "has no known dtype, shape and data_offsets"),
    "another type": (a_is(dtype="F64"), "F64 of [4, 6] does not fill bytes 0 to 96"),
    # entries
    "an entry that is a list": (
        sound(x=["F32", [1], [0, 4]]),
        "tensor 'x': its entry ['F32', [1], [0, 4]] has no known",
    ),
    "an entry that is null": (sound(x=None), "tensor 'x': its entry None has no known dtype"),
    "an empty entry": (sound(x={}), "tensor 'x': its entry {} has no known dtype"),
}

#: What the safetensors package itself lets through: names given twice, arrays that NumPy cannot hold, fields given
#: twice in another spelling.
MORE_THAN_THE_PACKAGE = {
    "a tensor twice",
    "a tensor twice, the first spelt in another way",
    "a tensor twice, its name spelt in another way",
    "a tensor twice, paid for by quotes in the metadata",
    "no elements in 2**63 columns",
    "no elements in 2**62 columns",
    "more dimensions than an array has",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_lies_is_refused_with_what_is_wrong(folder: Path, attack: str) -> None:
    data, said = ATTACKS[attack]
    error = refused(put(folder, data))
    assert said in str(error)
    assert str(folder / "adapter_model.safetensors") in str(error)


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - MORE_THAN_THE_PACKAGE))
def test_the_safetensors_package_refuses_it_too(folder: Path, attack: str) -> None:
    put(folder, ATTACKS[attack][0])
    with pytest.raises(SafetensorError), safe_open(folder / "adapter_model.safetensors", "np"):
        pass


@pytest.mark.parametrize("length", [100_000_001, (1 << 32) - 8])
def test_a_header_longer_than_any_is_not_read(folder: Path, length: int) -> None:
    path = put(folder, length.to_bytes(8, "little") + b"{") / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(1 << 32)  # a hole: the file says 4 GiB and takes no room
    assert f"its header has {length} bytes" in str(refused(folder))


def test_entries_without_end_cost_what_the_file_is_long(folder: Path) -> None:
    error = refused(put(folder, sound(**{str(n): [] for n in range(20_000)})))
    assert len(error.problems) == 20_000
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [176, 176]}
    error = refused(put(folder, sound(**{str(n): empty for n in range(20_000)})))
    assert len(error.problems) == 20_000


def test_twins_among_names_without_end_are_found_soon(folder: Path) -> None:
    empty = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [176, 176]})
    names = ", ".join(f'"{n // 2}": {empty}' for n in range(40_000))
    assert "'0', '1', '2', '3', '4', '5', ...] appears twice" in str(
        refused(put(folder, raw(HEAD[:-1] + b", " + names.encode() + b"}")))
    )


def test_one_error_lists_every_lie(folder: Path) -> None:
    lies = {
        "one": {"dtype": "F33", "shape": [1], "data_offsets": [176, 180]},
        "two": {"dtype": "F32", "shape": [-1], "data_offsets": [176, 180]},
        "three": {"dtype": "F32", "shape": [1], "data_offsets": [172, 176]},
        "four": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]},
        "five": 5,
    }
    error = refused(put(folder, sound(**lies)))
    assert len(error.problems) == 5
    for name in lies:
        assert f"tensor '{name}'" in str(error)
    assert "5 problems" in str(error)
