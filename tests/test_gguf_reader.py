"""GGUF adapters, written by the real gguf.GGUFWriter, against gguf's own reader and dequantisation."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFEndian, GGUFValueType

from lorastack import LoadedLora, load
from lorastack.errors import FormatError, NonFiniteError

RNG = np.random.default_rng(0)
W = "blk.0.attn_q.weight"
Tensors = Mapping[str, np.ndarray | tuple[np.ndarray, Q]]


def randoms(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def write(
    path: Path,
    tensors: Tensors,
    alpha: Any = 8.0,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    keys: Mapping[str, tuple[Any, GGUFValueType]] | None = None,
) -> Path:
    """An adapter file; ``keys`` adds metadata, or takes it out where the value is None."""
    said = {
        "general.type": ("adapter", GGUFValueType.STRING),
        "adapter.type": ("lora", GGUFValueType.STRING),
        "adapter.lora.alpha": (alpha, GGUFValueType.FLOAT32),
        **(keys or {}),
    }
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    if "general.architecture" in said:
        del writer.kv_data[0]["general.architecture"]
    for key, (value, kind) in said.items():
        if value is not None:
            writer.add_key_value(key, value, kind, GGUFValueType.UINT32 if kind == GGUFValueType.ARRAY else None)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(weight: str = W, rank: int = 4, n_in: int = 6, n_out: int = 5) -> dict[str, np.ndarray]:
    return {f"{weight}.lora_a": randoms(rank, n_in), f"{weight}.lora_b": randoms(n_out, rank)}


def refusal(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        load(path)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.gguf"


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_plain_types_are_read_as_they_are(file: Path, dtype: type) -> None:
    tensors = {name: array.astype(dtype) for name, array in pair().items()}
    delta = load(write(file, tensors)).adapters[W]
    assert delta.a.dtype == delta.b.dtype == dtype
    np.testing.assert_array_equal(delta.a, tensors[f"{W}.lora_a"])
    np.testing.assert_array_equal(delta.b, tensors[f"{W}.lora_b"])
    expected = tensors[f"{W}.lora_b"].astype(float) @ tensors[f"{W}.lora_a"].astype(float) * 8 / 4
    np.testing.assert_allclose(delta.dense(), expected, rtol=0, atol=2e-5)


def test_bfloat16_is_read_as_it_is(file: Path) -> None:
    tensors = pair()
    stored = {name: (gguf.quants.quantize(array, Q.BF16), Q.BF16) for name, array in tensors.items()}
    delta = load(write(file, stored)).adapters[W]
    assert delta.a.dtype == delta.b.dtype == ml_dtypes.bfloat16
    assert delta.a.shape == (4, 6)
    for half, array in ((delta.a, tensors[f"{W}.lora_a"]), (delta.b, tensors[f"{W}.lora_b"])):
        np.testing.assert_array_equal(half, array.astype(ml_dtypes.bfloat16))


def both_ways() -> list[Q]:
    """The types that the installed gguf can write and read back."""
    found = []
    for kind in gguf.quants._type_traits:
        try:
            gguf.quants.dequantize(gguf.quants.quantize(np.ones((1, 256), np.float32), kind), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


BOTH_WAYS = both_ways()


@pytest.mark.parametrize("kind", BOTH_WAYS, ids=lambda kind: kind.name)
def test_a_quantised_type_is_read_as_gguf_dequantises_it(file: Path, kind: Q) -> None:
    a, b = randoms(256, 512), randoms(64, 256)
    packed = {f"{W}.lora_a": gguf.quants.quantize(a, kind), f"{W}.lora_b": gguf.quants.quantize(b, kind)}
    delta = load(write(file, {name: (data, kind) for name, data in packed.items()})).adapters[W]
    assert (delta.rank, delta.in_features, delta.out_features, delta.scaling) == (256, 512, 64, 8 / 256)
    assert {factor.stored for factor in delta.factors} == {kind.name}
    np.testing.assert_array_equal(delta.a, gguf.quants.dequantize(packed[f"{W}.lora_a"], kind))
    np.testing.assert_array_equal(delta.b, gguf.quants.dequantize(packed[f"{W}.lora_b"], kind))
    assert np.abs(delta.a.astype(float) - a).mean() < np.abs(a).mean(), "it is the array that was quantised"


def test_the_usual_quantised_types_are_among_those_tested() -> None:
    assert {Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1} <= set(BOTH_WAYS)


READ_ONLY = sorted(set(gguf.quants._type_traits) - set(BOTH_WAYS))


@pytest.mark.parametrize("kind", READ_ONLY, ids=lambda kind: kind.name)
def test_a_type_that_gguf_only_reads_is_read_as_gguf_does(file: Path, kind: Q) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Any bytes are blocks of some numbers, NaN among them.
    data = RNG.integers(0, 256, (256, 512 // block * size), dtype=np.uint8)
    tensors: Tensors = {f"{W}.lora_a": (data, kind), f"{W}.lora_b": randoms(8, 256)}
    delta = load(write(file, tensors), allow_nonfinite=True).adapters[W]
    assert delta.a.shape == (256, 512)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(delta.a, gguf.quants.dequantize(data, kind))


def test_integers_are_refused_by_name(file: Path) -> None:
    tensors = pair() | {f"{W}.lora_a": np.ones((4, 6), np.int32), "blk.0.attn_norm.weight": np.ones(4, np.int8)}
    error = refusal(write(file, tensors))
    assert f"tensor {W}.lora_a: found type I32, expected floats or quants" in str(error)
    assert "tensor blk.0.attn_norm.weight: found type I8" in str(error)
    assert len(error.problems) == 2, "and not that lora_b stands alone: it does not"


# ---- kinds of weights -----------------------------------------------------------------------------


def test_the_token_embedding_is_stored_by_token_and_looked_up_by_id(file: Path) -> None:
    a, b = randoms(30, 4), randoms(7, 4)  # (vocabulary, rank) and (width, rank)
    lora = load(write(file, {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}))
    delta = lora.adapters["token_embd.weight"]
    assert (delta.kind, delta.rank, delta.in_features, delta.out_features) == ("embedding", 4, 30, 7)
    ids = np.array([[0, 29], [3, 3]])
    np.testing.assert_allclose(delta.apply(ids), 2.0 * a[ids].astype(float) @ b.T.astype(float), rtol=0, atol=1e-5)
    np.testing.assert_allclose(delta.dense().T, 2.0 * a @ b.T, rtol=0, atol=1e-5)


def test_experts_have_a_rank_and_a_scaling_of_their_own(file: Path) -> None:
    weight = "blk.3.ffn_gate_exps.weight"
    a, b = randoms(3, 5, 6), randoms(3, 7, 5)  # (experts, rank, in) and (experts, out, rank)
    delta = load(write(file, {f"{weight}.lora_a": a, f"{weight}.lora_b": b})).adapters[weight]
    assert (delta.kind, delta.num_experts, delta.rank, delta.scaling) == ("experts", 3, 5, 8 / 5)
    assert (delta.in_features, delta.out_features) == (6, 7)
    expected = np.einsum("eor,eri->eoi", b.astype(float), a.astype(float)) * 8 / 5
    np.testing.assert_allclose(delta.dense(), expected, rtol=0, atol=1e-5)


def test_norms_are_extras(file: Path) -> None:
    norm = randoms(6)
    lora = load(write(file, pair() | {"blk.0.attn_norm.weight": norm, "output_norm.weight": norm.astype(np.float16)}))
    assert set(lora.adapters) == {W}
    assert {kind: set(values) for kind, values in lora.extras.items()} == {
        "norm": {"blk.0.attn_norm.weight", "output_norm.weight"}
    }
    np.testing.assert_array_equal(lora.extras["norm"]["blk.0.attn_norm.weight"].array, norm)


def test_invocation_tokens_are_an_extra(file: Path) -> None:
    keys = {"adapter.alora.invocation_tokens": ([5, 0, 70000], GGUFValueType.ARRAY)}
    assert load(write(file, pair(), keys=keys)).extras["alora"] == {"invocation_tokens": (5, 0, 70000)}
    assert "alora" not in load(write(file, pair())).extras


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [(5, GGUFValueType.UINT32, "found 5"), ("5 6", GGUFValueType.STRING, "found '5 6'")],
    ids=["number", "string"],
)
def test_invocation_tokens_that_are_no_list_are_refused(
    file: Path, value: Any, kind: GGUFValueType, found: str
) -> None:
    error = refusal(write(file, pair(), keys={"adapter.alora.invocation_tokens": (value, kind)}))
    assert f"adapter.alora.invocation_tokens: {found}, expected a list of token ids" in str(error)


# ---- alpha ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scaling"), [(8.0, 2.0), (3.0, 0.75), (-4.0, -1.0), (0.0, 1.0), (None, 1.0)])
def test_scaling_is_alpha_by_rank_and_one_without_alpha(file: Path, alpha: float | None, scaling: float) -> None:
    tensors = pair()
    lora = load(write(file, tensors, alpha=alpha))
    assert lora.adapters[W].scaling == scaling
    assert (lora.file_alpha, lora.alpha) == (alpha or None, alpha or 4.0)
    expected = tensors[f"{W}.lora_b"] @ tensors[f"{W}.lora_a"] * scaling
    np.testing.assert_allclose(lora.adapters[W].dense(), expected, rtol=0, atol=1e-5)


def test_each_weight_has_the_scaling_of_its_own_rank(file: Path) -> None:
    names = {f"blk.{rank}.attn_q.weight": rank for rank in (1, 3, 8)}
    tensors = {key: array for name, rank in names.items() for key, array in pair(name, rank).items()}
    lora = load(write(file, tensors, alpha=6.0))
    assert {name: delta.scaling for name, delta in lora.adapters.items()} == {n: 6 / rank for n, rank in names.items()}
    assert lora.rank == 8


@pytest.mark.parametrize(
    ("value", "kind"), [(16, GGUFValueType.UINT32), (16.0, GGUFValueType.FLOAT32), (16, GGUFValueType.INT64)], ids=str
)
def test_oxillamas_alpha_counts_where_there_is_no_other(file: Path, value: Any, kind: GGUFValueType) -> None:
    # lora.r, one rank for the file, does not: llama.cpp takes each tensor's own.
    oxillama = {"lora.alpha": (value, kind), "lora.r": (8, GGUFValueType.UINT32)}
    assert load(write(file, pair(), alpha=None, keys=oxillama)).adapters[W].scaling == 16 / 4
    assert load(write(file, pair(), alpha=8.0, keys=oxillama)).adapters[W].scaling == 8 / 4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter.lora.alpha": (8, GGUFValueType.UINT32)}, "adapter.lora.alpha: found UINT32, expected FLOAT32"),
        ({"adapter.lora.alpha": (8.0, GGUFValueType.FLOAT64)}, "found FLOAT64, expected FLOAT32"),
        ({"adapter.lora.alpha": ("8", GGUFValueType.STRING)}, "found STRING, expected FLOAT32"),
        ({"adapter.lora.alpha": ([8], GGUFValueType.ARRAY)}, "found ARRAY, expected FLOAT32"),
        ({"adapter.lora.alpha": (float("nan"), GGUFValueType.FLOAT32)}, "alpha: found nan, expected a finite number"),
        ({"adapter.lora.alpha": (float("inf"), GGUFValueType.FLOAT32)}, "alpha: found inf"),
        ({"adapter.lora.alpha": (None, None), "lora.alpha": ("8", GGUFValueType.STRING)}, "alpha: found '8'"),
        ({"adapter.lora.alpha": (None, None), "lora.alpha": (True, GGUFValueType.BOOL)}, "alpha: found True"),
        ({"adapter.lora.alpha": (None, None), "lora.alpha": (1e300, GGUFValueType.FLOAT64)}, "alpha: found 1e+300"),
    ],
    ids=range(9),
)
def test_an_alpha_of_another_type_or_without_end_is_refused(file: Path, keys: dict[str, Any], said: str) -> None:
    assert said in str(refusal(write(file, pair(), keys=keys)))


# ---- what the file says of itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.type", None, "general.type: found None, expected 'adapter'"),
        ("general.type", "model", "found 'model', expected 'adapter'; this is a whole model"),
        ("general.type", "mmproj", "found 'mmproj', expected 'adapter'"),
        ("adapter.type", None, "adapter.type: found None, expected 'lora'"),
        ("adapter.type", "control_vector", "adapter.type: found 'control_vector', expected 'lora'"),
        ("general.architecture", None, "general.architecture: found None"),
        ("general.architecture", "", "general.architecture: found ''"),
    ],
)
def test_a_file_that_does_not_say_it_is_a_lora_is_refused(file: Path, key: str, value: Any, said: str) -> None:
    assert said in str(refusal(write(file, pair(), keys={key: (value, GGUFValueType.STRING)})))


def test_one_part_of_a_split_adapter_is_refused(file: Path) -> None:
    write(file, pair(), keys={"split.count": (3, GGUFValueType.UINT16)})
    assert "split.count: found 3, expected 1; it is one part of an adapter" in str(refusal(file))
    write(file, pair(), keys={"split.count": (1, GGUFValueType.UINT16)})
    assert load(file).num_adapters() == 1


def test_metadata_names_and_source_are_kept(tmp_path: Path) -> None:
    keys = {"adapter.lora.task_name": ("Erzähl", GGUFValueType.STRING), "x.list": ([1, 2], GGUFValueType.ARRAY)}
    path = write(tmp_path / "my.adapter", pair(), keys=keys)
    lora = load(path)
    assert (lora.name, lora.naming, lora.source) == ("my", "gguf", path)
    assert load(path, name="other").name == "other"
    assert lora.metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "adapter.lora.task_name": "Erzähl",
        "x.list": [1, 2],
    }


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{W}.lora_c": (2, 2)}, f"tensor {W}.lora_c: expected NAME.weight.lora_a or NAME.weight.lora_b"),
        ({W: (5, 6)}, f"tensor {W}: expected"),
        ({"blk.0.attn_q.bias.lora_a": (4, 6), "blk.0.attn_q.bias.lora_b": (5, 4)}, "tensor blk.0.attn_q.bias.lora_a"),
        ({"rope_freqs.weight.lora_a": (4, 6)}, "tensor rope_freqs.weight.lora_a: expected"),
        ({"blk.1.attn_q.weight.lora_b": (5, 4)}, "blk.1.attn_q.weight.lora_b has no blk.1.attn_q.weight.lora_a"),
        ({f"{W}.lora_a": (3, 6)}, "lora_A is (3, 6) and lora_B is (5, 4): rank 3 against 4"),
        ({f"{W}.lora_a": (2, 4, 6)}, "lora_A is (2, 4, 6) and lora_B is (5, 4): experts factors have 3 dimensions"),
        ({f"{W}.lora_a": (2, 4, 6), f"{W}.lora_b": (3, 5, 4)}, "2 experts against 3"),
        ({f"{W}.lora_a": (4, 0)}, "lora_A is (4, 0) and lora_B is (5, 4): a dimension is 0"),
        ({f"{W}.lora_a": (24,)}, "linear factors have 2 dimensions each"),
        (
            {"token_embd.weight.lora_a": (4, 30), "token_embd.weight.lora_b": (7, 4)},
            "weight token_embd.weight: lora_A is (30, 4) and lora_B is (7, 4): rank 30 against 4",
        ),
    ],
    ids=range(11),
)
def test_a_tensor_that_does_not_fit_is_refused(file: Path, tensors: dict[str, tuple[int, ...]], said: str) -> None:
    shapes = pair() | {name: randoms(*shape) for name, shape in tensors.items()}
    error = refusal(write(file, shapes))
    assert said in str(error)
    assert str(file) in str(error)


def test_an_adapter_without_tensors_is_refused(file: Path) -> None:
    assert "no lora_a/lora_b tensors, so it would change nothing" in str(refusal(write(file, {})))
    assert "would change nothing" in str(refusal(write(file, {"output_norm.weight": randoms(4)})))


def test_one_error_lists_all_that_is_wrong(file: Path) -> None:
    tensors = pair() | pair("blk.1.attn_k.weight") | {"stray": randoms(2), f"{W}.lora_b": randoms(5, 3)}
    del tensors["blk.1.attn_k.weight.lora_b"]
    keys = {"adapter.type": ("x", GGUFValueType.STRING), "adapter.lora.alpha": (8, GGUFValueType.UINT32)}
    error = refusal(write(file, tensors, keys=keys))
    words = ("adapter.type", "adapter.lora.alpha", "tensor stray", "blk.1.attn_k.weight.lora_a has no", "4 against 3")
    assert all(any(word in problem for problem in error.problems) for word in words)
    assert len(error.problems) == 5
    assert "5 problems" in str(error)


# ---- byte order and versions ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_big_endian_file_is_the_same_adapter(tmp_path: Path, dtype: type) -> None:
    tensors = {name: array.astype(dtype) for name, array in pair().items()}
    keys = {"adapter.alora.invocation_tokens": ([5, 6], GGUFValueType.ARRAY)}
    little = load(write(tmp_path / "a.gguf", tensors, keys=keys))
    big = load(write(tmp_path / "b.gguf", tensors, keys=keys, endian=GGUFEndian.BIG))
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()
    same(big, little)
    assert big.adapters[W].a.dtype.isnative


def test_nan_and_inf_are_seen_in_a_big_endian_file(file: Path) -> None:
    tensors = {name: array.astype(np.float16) for name, array in pair().items()}
    tensors[f"{W}.lora_a"][1, 1] = np.inf
    lora = load(write(file, tensors, endian=GGUFEndian.BIG))
    with pytest.raises(NonFiniteError, match=r"lora_a: 1 of 24 values are NaN or Inf"):
        lora.check()


@pytest.mark.parametrize("kind", [Q.BF16, Q.Q8_0], ids=lambda kind: kind.name)
def test_a_packed_type_of_the_other_byte_order_is_refused(file: Path, kind: Q) -> None:
    tensors: Tensors = {f"{W}.lora_a": (gguf.quants.quantize(randoms(4, 32), kind), kind), f"{W}.lora_b": randoms(5, 4)}
    error = refusal(write(file, tensors, endian=GGUFEndian.BIG))
    assert f"tensor {W}.lora_a: {kind.name} in a file of the other byte order" in str(error)
    assert len(error.problems) == 1


def test_version_2_is_read_and_others_are_refused(file: Path) -> None:
    data = bytearray(write(file, pair()).read_bytes())
    lora = load(file)
    data[4] = 2
    (second := file.with_name("second.gguf")).write_bytes(data)
    same(load(second), lora)
    for version in (0, 1, 4, 200):
        data[4] = version
        file.write_bytes(data)
        assert "GGUF version" in str(refusal(file))


# ---- an open reader -----------------------------------------------------------------------------------


def test_an_open_reader_gives_the_same_adapter(file: Path) -> None:
    tensors: Tensors = {
        f"{W}.lora_a": (gguf.quants.quantize(randoms(32, 64), Q.Q8_0), Q.Q8_0),
        f"{W}.lora_b": randoms(5, 32).astype(np.float16),
        "output_norm.weight": randoms(3),
    }
    write(file, tensors)
    reader = gguf.GGUFReader(file)
    lora = LoadedLora.from_gguf(reader)
    same(lora, load(file))
    assert (lora.name, lora.source) == ("mine", file)
    assert LoadedLora.from_gguf(reader, name="other").name == "other"


def test_an_open_reader_of_a_model_is_refused(file: Path) -> None:
    write(file, pair(), keys={"general.type": ("model", GGUFValueType.STRING)})
    with pytest.raises(FormatError, match="found 'model', expected 'adapter'"):
        LoadedLora.from_gguf(gguf.GGUFReader(file))


def test_an_open_reader_of_overlapping_tensors_is_refused(file: Path) -> None:
    tensors = pair()
    data = write(file, tensors).read_bytes()
    reader = gguf.GGUFReader(file)
    at = reader.tensors[1].field.parts[-1]  # the offset of lora_b, which becomes lora_a's
    assert int(at[0]) == 96
    start = data.index(f"{W}.lora_b".encode()) + len(f"{W}.lora_b") + 4 + 16 + 4
    file.write_bytes(data[:start] + bytes(8) + data[start + 8 :])
    with pytest.raises(FormatError, match=rf"tensors '{W}.lora_[ab]' and '{W}.lora_[ab]' overlap"):
        LoadedLora.from_gguf(gguf.GGUFReader(file))


# ---- numbers that are none, and reading late ------------------------------------------------------------


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0], ids=lambda kind: kind.name)
def test_nan_is_an_error_on_the_first_read_that_lists_every_factor(file: Path, kind: Q) -> None:
    a, b = randoms(32, 64), randoms(64, 32)
    bad_a, bad_b = a.copy(), b.copy()
    bad_a[3, 5], bad_b[0, 0], bad_b[7, 1] = np.nan, np.inf, -np.inf
    arrays = {
        "blk.0.attn_q.weight.lora_a": bad_a,
        "blk.0.attn_q.weight.lora_b": b,
        "blk.1.attn_q.weight.lora_a": a,
        "blk.1.attn_q.weight.lora_b": bad_b,
    }
    with np.errstate(invalid="ignore"):
        write(file, {name: (gguf.quants.quantize(array, kind), kind) for name, array in arrays.items()})
    lora = load(file)  # opening reads no factor, so it cannot know
    with pytest.raises(NonFiniteError) as caught:
        lora.check()
    # A whole block of 32 is lost with one value in Q8_0.
    bad = (32, 64) if kind == Q.Q8_0 else (1, 2)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        f"{file}: tensor blk.0.attn_q.weight.lora_a: {bad[0]} of 2048 values are NaN or Inf",
        f"{file}: tensor blk.1.attn_q.weight.lora_b: {bad[1]} of 2048 values are NaN or Inf",
    ]
    for name in lora.adapters:
        with pytest.raises(NonFiniteError, match="allow_nonfinite=True"):
            lora.adapters[name].apply(np.ones(64))
    let_through = load(file, allow_nonfinite=True)
    let_through.check()
    assert np.isnan(let_through.adapters["blk.0.attn_q.weight"].a[3, 5])
    assert LoadedLora.from_gguf(gguf.GGUFReader(file), allow_nonfinite=True).adapters[W].a.size == 2048


def test_a_norm_with_nan_is_an_error_when_it_is_read(file: Path) -> None:
    lora = load(write(file, pair() | {"output_norm.weight": np.array([1, np.nan], np.float32)}))
    with pytest.raises(NonFiniteError, match=r"tensor output_norm\.weight: 1 of 2"):
        _ = lora.extras["norm"]["output_norm.weight"].array


def test_opening_reads_no_factor(file: Path) -> None:
    gigabytes = 8
    rank, n_in = 1 << 12, gigabytes << 16
    small = {f"{W}.lora_a": randoms(4, 6), f"{W}.lora_b": randoms(5, 4)}
    # The header of a large file: the writer is told shapes, the data is a hole in the file.
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    big = "blk.1.ffn_up.weight"
    for name, shape in [(f"{big}.lora_b", (8, rank)), *((n, a.shape) for n, a in small.items()), (f"{big}.lora_a", 0)]:
        writer.add_tensor_info(
            name, shape or (rank, n_in), np.dtype(np.float32), 4 * int(np.prod(shape or (rank, n_in)))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-file.stat().st_size // 32) * 32 + 8 * rank * 4
    with file.open("r+b") as handle:
        for array in small.values():
            handle.seek(start)
            handle.write(array.tobytes())
            start += 96
        handle.truncate(start + 4 * rank * n_in)
    assert file.stat().st_size > gigabytes << 30

    load(file)  # imports and caches are not what is measured
    tracemalloc.start()
    began = time.process_time()
    lora = load(file)
    y = lora.adapters[W].apply(np.ones(6))
    took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(y, small[f"{W}.lora_b"] @ small[f"{W}.lora_a"].sum(1), rtol=0, atol=1e-5)
    assert (lora.adapters[big].rank, lora.adapters[big].in_features) == (rank, n_in)
    assert peak < 1 << 20
    assert took < 0.5, "milliseconds, and no second for each gigabyte"


def test_a_factor_is_read_once_into_memory_of_its_own_and_read_only(file: Path) -> None:
    delta = load(write(file, pair(n_in=1 << 18))).adapters[W]
    tracemalloc.start()
    a = delta.a
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert a.nbytes == 4 << 20
    assert a.nbytes < peak < 1.5 * a.nbytes, "the numbers, the finiteness check's booleans, and no second copy"
    assert delta.a is a
    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 1


def same(one: LoadedLora, other: LoadedLora) -> None:
    assert list(one.adapters) == list(other.adapters)
    assert dict(one.metadata) == dict(other.metadata)
    assert one.file_alpha == other.file_alpha
    assert {kind: list(values) for kind, values in one.extras.items()} == {
        kind: list(values) for kind, values in other.extras.items()
    }
    for name, delta in one.adapters.items():
        twin = other.adapters[name]
        assert (delta.scaling, delta.kind, delta.a.dtype) == (twin.scaling, twin.kind, twin.a.dtype)
        np.testing.assert_array_equal(delta.a, twin.a)
        np.testing.assert_array_equal(delta.b, twin.b)
    for name, norm in one.extras.get("norm", {}).items():
        np.testing.assert_array_equal(norm.array, other.extras["norm"][name].array)
