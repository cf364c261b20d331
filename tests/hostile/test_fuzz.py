"""Damaged files: whatever was changed, there is an error of ours or the result that the format's own library gives."""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from lorastack import LoadedLora, load
from lorastack.errors import LoraStackError, NonFiniteError

fuzz = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    # One folder for all examples of a test: each writes its files anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

#: Fewer are enough where only numbers change.
fuzz_numbers = settings(fuzz, max_examples=150)

Edit = tuple[str, float, bytes]
#: Bytes that mean something where they land: lengths, counts, types, JSON.
TELLING = [
    *(n.to_bytes(8, "little") for n in (0, 1, 2, 1 << 31, 1 << 32, 1 << 60, 1 << 63, (1 << 64) - 1)),
    *(n.to_bytes(4, "little") for n in (0, 1, 8, 9, 13, 31, (1 << 32) - 1)),
    *(b"[", b"]", b"{", b"}", b'"', b",", b":", b"0", b"-", b"1e999", b"null", b"\\u0061", b"\x00", b"\xff"),
]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "over", "insert", "delete", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(TELLING) | st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def changed(data: bytes, edits: list[Edit]) -> bytes:
    """``data`` after these edits, each at a place given as a part of the length."""
    out = bytearray(data)
    for what, where, value in edits:
        at = int(where * len(out))
        if what == "flip" and out:
            out[at] ^= 1 << value[0] % 8
        elif what == "over":
            out[at : at + len(value)] = value
        elif what == "insert":
            out[at:at] = value
        elif what == "delete":
            del out[at : at + len(value)]
        elif what == "double":
            out[at:at] = out[at : at + 8 * value[0]]
    return bytes(out)


def outcome(path: Path) -> LoadedLora | None:
    """The adapter with all it holds read, NaN let through; None when it is refused by an error of ours."""
    try:
        lora = load(path)
    except LoraStackError:
        return None
    try:
        lora.check()
    except NonFiniteError:
        lora = load(path, allow_nonfinite=True)
        lora.check()
    for values in lora.extras.values():
        for value in values.values():
            if hasattr(value, "raw"):
                value.raw()
    return lora


# ---- GGUF ---------------------------------------------------------------------------------------


@functools.cache
def gguf_bytes() -> bytes:
    """A small adapter with a bit of everything."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "x.gguf", rng).read_bytes()


def write_gguf(path: Path, rng: np.random.Generator) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_string("adapter.lora.task_name", "tale")
    writer.add_array("adapter.alora.invocation_tokens", [3, 4])
    writer.add_array("x.names", ["a", "bc"])
    arrays = {
        "blk.0.attn_q.weight": (Q.F32, (2, 6), (5, 2)),
        "token_embd.weight": (Q.F16, (9, 2), (4, 2)),
        "blk.1.ffn_up.weight": (Q.Q8_0, (32, 32), (2, 32)),
        "blk.1.ffn_up_exps.weight": (Q.BF16, (2, 3, 4), (2, 5, 3)),
    }
    for name, (kind, shape_a, shape_b) in arrays.items():
        for part, shape in (("lora_a", shape_a), ("lora_b", shape_b)):
            array = rng.standard_normal(shape).astype(np.float32)
            writer.add_tensor(f"{name}.{part}", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_file(path: Path) -> bytes:
    path.write_bytes(gguf_bytes())
    return gguf_bytes()


def check_against_gguf(path: Path, lora: LoadedLora) -> None:
    """What was loaded is what gguf's own reader finds in the same bytes."""
    reader = gguf.GGUFReader(path)
    with np.errstate(all="ignore"):
        tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    alpha = next((reader.fields[k].contents() for k in ("adapter.lora.alpha", "lora.alpha") if k in reader.fields), 0)
    used = set()
    for name, delta in lora.adapters.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        np.testing.assert_array_equal(np.asarray(delta.a, np.float32), a.T if name == "token_embd.weight" else a)
        np.testing.assert_array_equal(np.asarray(delta.b, np.float32), b)
        assert delta.scaling == (alpha / b.shape[-1] if alpha else 1.0)
        used |= {f"{name}.lora_a", f"{name}.lora_b"}
    for name, norm in lora.extras.get("norm", {}).items():
        np.testing.assert_array_equal(norm.raw(), tensors[name])
        used.add(name)
    assert used == set(tensors)
    assert lora.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}


@fuzz
@given(edits)
def test_a_damaged_gguf_header_is_refused_or_read_as_gguf_does(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "x.gguf"
    whole = gguf_file(path)
    start = gguf.GGUFReader(path).data_offset
    path.write_bytes(changed(whole[:start], edits) + whole[start:])
    lora = outcome(path)
    if lora is not None:
        check_against_gguf(path, lora)


@fuzz
@given(edits)
def test_a_damaged_gguf_file_is_refused_or_read_as_gguf_does(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(changed(gguf_file(path), edits))
    lora = outcome(path)
    if lora is not None:
        check_against_gguf(path, lora)


@fuzz_numbers
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flip_among_a_gguf_files_numbers_leaves_all_else_as_it_was(tmp_path: Path, where: float, bit: int) -> None:
    path = tmp_path / "x.gguf"
    whole = bytearray(gguf_file(path))
    sound = load(path)
    start = gguf.GGUFReader(path).data_offset
    whole[start + int(where * (len(whole) - start))] ^= 1 << bit
    (other := tmp_path / "other.gguf").write_bytes(whole)
    lora = outcome(other)
    assert lora is not None, "numbers may be anything"
    check_against_gguf(other, lora)
    same_but_for_one(lora, sound)


# ---- PEFT ---------------------------------------------------------------------------------------

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "target_modules": ["q_proj", "emb"],
    "rank_pattern": {"k_proj": 3},
    "alpha_pattern": {"k_proj": 6},
    "modules_to_save": ["head"],
    "init_lora_weights": True,
    "layers_pattern": None,
}
PREFIX = "base_model.model."


@functools.cache
def peft_bytes() -> tuple[bytes, bytes]:
    """A small adapter: the bytes of its config and of its weights."""
    rng = np.random.default_rng(0)
    shapes = {
        "q_proj.lora_A.weight": (2, 6),
        "q_proj.lora_B.weight": (5, 2),
        "k_proj.lora_A.weight": (3, 6),
        "k_proj.lora_B.weight": (5, 3),
        "emb.lora_embedding_A": (2, 9),
        "emb.lora_embedding_B": (4, 2),
        "conv.lora_A.weight": (2, 3, 3, 3),
        "conv.lora_B.weight": (4, 2, 1, 1),
        "head.weight": (3, 4),
    }
    arrays = {PREFIX + key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    arrays[PREFIX + "q_proj.lora_A.weight"] = arrays[PREFIX + "q_proj.lora_A.weight"].astype(np.float16)
    return json.dumps(CONFIG).encode(), save_safetensors(arrays, {"format": "pt", "said": 'a "b" \n c'})


def peft_folder(folder: Path) -> tuple[bytes, bytes]:
    put(folder, *peft_bytes())
    return peft_bytes()


def put(folder: Path, config: bytes, weights: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)


def check_against_peft(folder: Path, lora: LoadedLora) -> None:
    """What was loaded is what the safetensors package and PEFT's rules find in the same bytes."""
    tensors = load_safetensors((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_bytes())
    used = set()
    for name, delta in lora.adapters.items():
        module = name.removesuffix(".weight")
        ends = (".lora_embedding_A", ".lora_embedding_B") if delta.kind == "embedding" else LINEAR
        keys = [f"{PREFIX}{module}{end}" for end in ends]
        np.testing.assert_array_equal(delta.a, tensors[keys[0]])
        np.testing.assert_array_equal(delta.b, tensors[keys[1]])
        rank = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        assert delta.rank == rank
        assert delta.scaling == pytest.approx(
            alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rel=1e-12
        )
        used |= set(keys)
    # The rest of the file is kept, under its own name, whatever it is.
    rest = [value for values in lora.extras.values() for value in values.values() if hasattr(value, "raw")]
    assert len(rest) == len(tensors) - len(used)
    for value in rest:
        np.testing.assert_array_equal(value.raw(), tensors[value.label.partition(": tensor ")[2]])
    assert lora.metadata == config


LINEAR = (".lora_A.weight", ".lora_B.weight")


def by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def weights_header(weights: bytes) -> int:
    return 8 + int.from_bytes(weights[:8], "little")


def relengthened(head: bytes) -> bytes:
    """The same header with its own length, so that the JSON and not the length is what is wrong."""
    return max(len(head) - 8, 0).to_bytes(8, "little") + head[8:]


@fuzz
@given(edits, st.sampled_from([relengthened, bytes]))
def test_a_damaged_safetensors_header_is_refused_or_read_as_the_package_does(
    tmp_path: Path, edits: list[Edit], finish: Callable[[bytes], bytes]
) -> None:
    config, weights = peft_folder(tmp_path)
    start = weights_header(weights)
    put(tmp_path, config, finish(changed(weights[:start], edits)) + weights[start:])
    lora = outcome(tmp_path)
    if lora is not None:
        check_against_peft(tmp_path, lora)


@fuzz
@given(edits)
def test_a_damaged_peft_config_is_refused_or_read_as_peft_does(tmp_path: Path, edits: list[Edit]) -> None:
    config, weights = peft_folder(tmp_path)
    put(tmp_path, changed(config, edits), weights)
    lora = outcome(tmp_path)
    if lora is not None:
        check_against_peft(tmp_path, lora)


@fuzz_numbers
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flip_among_a_peft_files_numbers_leaves_all_else_as_it_was(tmp_path: Path, where: float, bit: int) -> None:
    config, weights = peft_folder(tmp_path)
    sound = load(tmp_path)
    sound.check()
    start = weights_header(weights)
    flipped = bytearray(weights)
    flipped[start + int(where * (len(weights) - start))] ^= 1 << bit
    (other := tmp_path / "other").mkdir(exist_ok=True)
    put(other, config, bytes(flipped))
    lora = outcome(other)
    assert lora is not None, "numbers may be anything"
    check_against_peft(other, lora)
    same_but_for_one(lora, sound)


def same_but_for_one(lora: LoadedLora, sound: LoadedLora) -> None:
    """The same names, shapes, scalings and metadata; at most one array with other numbers."""
    assert lora.metadata == sound.metadata
    assert [list(values) for values in lora.extras.values()] == [list(values) for values in sound.extras.values()]
    assert list(lora.adapters) == list(sound.adapters)
    others = 0
    for name, delta in lora.adapters.items():
        twin = sound.adapters[name]
        assert (delta.scaling, delta.kind) == (twin.scaling, twin.kind)
        assert [f.shape for f in delta.factors] == [f.shape for f in twin.factors]
        others += not np.array_equal(delta.a, twin.a, equal_nan=True)
        others += not np.array_equal(delta.b, twin.b, equal_nan=True)
    assert others <= 1
