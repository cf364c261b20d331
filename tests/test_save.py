"""Writing adapters: nothing is lost that the format can hold, the rest is said, and outputs are whole or not there."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file

from lorastack import LoadedLora, LoraDelta, LoraStack, load, save
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, FormatError, NonFiniteError
from lorastack.files import OutputError
from tests.fixtures.make_logits import peft_model

TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
#: Half a unit in the last place, relative.
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
By = dict[str, tuple[np.ndarray, np.ndarray, float]]


def lora_of(deltas: dict[str, LoraDelta], naming: str, arch: str = "llama") -> LoadedLora:
    said = {"general.architecture": arch} if naming == "gguf" else {}
    return replace(LoadedLora.from_tensors(deltas, naming=naming), metadata=said)  # type: ignore[arg-type]


def delta_of(rng: np.random.Generator, kind: str, rank: int, dtype: np.dtype, scaling: float) -> LoraDelta:
    a, b = {
        "linear": ((rank, 32), (6, rank)),
        "embedding": ((rank, 11), (6, rank)),
        "experts": ((3, rank, 32), (3, 6, rank)),
        "conv": ((rank, 4, 3, 3), (6, rank, 1, 1)),
    }[kind]
    return LoraDelta(rng.standard_normal(a).astype(dtype), rng.standard_normal(b).astype(dtype), scaling, kind)  # type: ignore[arg-type]


# ---- the files, read by hand: by the formats' own packages and the rules of FORMATS.md


def gguf_by_hand(path: Path) -> tuple[By, float, dict[str, str]]:
    """weight -> (A, B, scaling) as llama.cpp reads it; the file's alpha; the types of the tensors."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    found = {}
    for name in sorted({name[:-7] for name in arrays if name.endswith((".lora_a", ".lora_b"))}):
        a, b = arrays[name + ".lora_a"], arrays[name + ".lora_b"]
        if name == "token_embd.weight":
            a = a.T
        scaling = np.float32(alpha) / np.float32(b.shape[-1]) if alpha else 1.0
        found[name] = (a, b, float(scaling))
    return found, alpha, {t.name: t.tensor_type.name.lower() for t in reader.tensors}


def peft_by_hand(folder: Path) -> By:
    """weight -> (A, B, scaling) as PEFT reads it."""
    config = LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        path = key.removeprefix("base_model.model.")
        if path.endswith(".lora_A.weight"):
            module, b = path[: -len(".lora_A.weight")], tensors[key.replace(".lora_A.", ".lora_B.")]
        elif path.endswith(".lora_embedding_A"):
            module, b = path[: -len(".lora_embedding_A")], tensors[key[:-1] + "B"]
        else:
            continue
        looked_up, name = module, module + ".weight"
        holder = module.removesuffix(".base_layer")
        inside = [p for p in config.target_parameters or [] if p.rpartition(".")[0] == holder]
        if inside:
            # gate_up_proj is registered first, so it is the inner one; a single parameter has no base_layer.
            name = sorted(inside, reverse=True)[0 if module != holder or len(inside) == 1 else 1]
            looked_up = name
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), looked_up), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), looked_up), config.lora_alpha)
        array_a, array_b = a.float().numpy(), b.float().numpy()
        if inside:
            array_a = array_a.reshape(-1, rank, array_a.shape[1])
            array_b = array_b.reshape(array_b.shape[0], rank, -1).transpose(2, 0, 1)
        else:
            assert rank == array_a.shape[0], f"{module}: PEFT makes rank {rank}, the file has {array_a.shape[0]}"
        found[name] = (array_a, array_b, alpha / rank**0.5 if config.use_rslora else alpha / rank)
    return found


def by_ours(lora: LoadedLora) -> By:
    return {n: (d.a.astype(np.float32), d.b.astype(np.float32), d.scaling) for n, d in lora.adapters.items()}


def assert_same(found: By, lora: LoadedLora, dtype: str | None, folded: bool) -> None:
    """Both factors and the scaling are the same to the bit; folded: B times scaling is, within a rounding."""
    assert sorted(found) == sorted(lora.adapters)
    for name, delta in lora.adapters.items():
        a, b, scaling = found[name]
        kept = TYPES[dtype] if dtype else delta.a.dtype
        np.testing.assert_array_equal(a, delta.a.astype(kept).astype(np.float32), err_msg=name)
        if not folded:
            np.testing.assert_array_equal(b, delta.b.astype(kept).astype(np.float32), err_msg=name)
            assert np.float32(scaling) == np.float32(delta.scaling), name
            continue
        assert scaling == 1.0
        true = delta.b.astype(np.float64) * delta.scaling
        # The product is rounded in float32 (as is the scaling), then once to the type.
        short = next(s for s, t in TYPES.items() if t == kept)
        slack = np.abs(true) * (ROUNDING[short] + 2 * ROUNDING["f32"]) + float(ml_dtypes.finfo(kept).smallest_subnormal)
        assert (np.abs(b - true) <= slack).all(), f"{name}: off by {np.abs(b - true).max()}"


# ---- round trips

GGUF_WEIGHTS = {
    "token_embd.weight": "embedding", "output.weight": "linear", "blk.0.attn_q.weight": "linear",
    "blk.1.attn_q.weight": "linear", "blk.11.ffn_down.weight": "linear", "blk.0.ffn_up_exps.weight": "experts",
    "blk.1.ffn_down_exps.weight": "experts"}  # fmt: skip
PEFT_WEIGHTS = {
    "embed.weight": "embedding", "lin.weight": "linear", "deep.lin.weight": "linear", "deep.er.lin.weight": "linear",
    "layers.1.q_proj.weight": "linear", "layers.11.q_proj.weight": "linear", "layers_1.q_proj.weight": "linear",
    "conv.weight": "conv", "mlp.experts.gate_up_proj": "experts", "mlp.experts.down_proj": "experts",
    "other.experts.down_proj": "experts"}  # fmt: skip
scalings = st.just(0.0) | st.floats(-40, 40).filter(lambda s: abs(s) > 1e-3)


@st.composite
def adapters(draw: st.DrawFn, table: dict[str, str]) -> tuple[dict[str, LoraDelta], str]:
    """Some weights of the table with ranks, types and scalings of their own, and how the scalings were drawn."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=6, unique=True))
    how = draw(st.sampled_from(["one alpha", "one scaling", "rslora", "each its own"]))
    alpha, one = draw(st.integers(1, 64) | st.floats(0.25, 40, width=32)), draw(scalings)
    deltas = {}
    for name in names:
        rank = draw(st.integers(1, 9))
        scaling = {"one alpha": alpha / rank, "one scaling": one, "rslora": alpha / rank**0.5}.get(how) or draw(
            scalings
        )
        deltas[name] = delta_of(rng, table[name], rank, TYPES[draw(st.sampled_from(sorted(TYPES)))], scaling)
    return deltas, how


@settings(max_examples=80, deadline=None)
@given(drawn=adapters(GGUF_WEIGHTS), dtype=st.none() | st.sampled_from(sorted(TYPES)))
def test_through_gguf_nothing_is_lost(drawn: tuple[dict[str, LoraDelta], str], dtype: str | None) -> None:
    deltas, how = drawn
    lora = lora_of(deltas, "gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = save(lora, Path(folder) / "x.gguf", dtype=dtype)
        found, alpha, types = gguf_by_hand(path)
        assert_same(found, lora, dtype, folded=alpha == 0)
        assert_same(by_ours(load(path)), lora, dtype, folded=alpha == 0)
        assert load(path).naming == "gguf"
    if how == "one alpha":
        assert alpha == pytest.approx(next(iter(deltas.values())).scaling * next(iter(deltas.values())).rank, rel=1e-6)
    for name, delta in deltas.items():
        stored = next(short for short, t in TYPES.items() if t == delta.a.dtype)
        assert {types[f"{name}.lora_a"], types[f"{name}.lora_b"]} == {dtype or stored}


@settings(max_examples=80, deadline=None)
@given(drawn=adapters(PEFT_WEIGHTS), dtype=st.none() | st.sampled_from(sorted(TYPES)))
def test_through_peft_nothing_is_lost(drawn: tuple[dict[str, LoraDelta], str], dtype: str | None) -> None:
    lora = lora_of(drawn[0], "hf")
    with tempfile.TemporaryDirectory() as folder:
        path = save(lora, Path(folder) / "x", dtype=dtype)
        names = sorted(file.name for file in path.iterdir())
        assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert_same(peft_by_hand(path), lora, dtype, folded=False)
        assert_same(by_ours(load(path)), lora, dtype, folded=False)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            stored = {str(file.get_slice(key).get_dtype()).lower() for key in file.keys()}  # noqa: SIM118
    kept = {short for short, t in TYPES.items() for d in drawn[0].values() if t == d.a.dtype}
    assert stored == ({dtype} if dtype else kept)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(
        st.lists(st.sampled_from(["a", "ab", "a_b", "1", "11", "q+"]), min_size=1, max_size=3).map(".".join),
        st.integers(1, 6),
        min_size=2,
        max_size=8,
    )
)
def test_a_pattern_hits_the_one_module_it_is_for(ranks: dict[str, int]) -> None:
    # Names that are suffixes of each other, or would be if a dot in a pattern were any character.
    rng = np.random.default_rng(0)
    deltas = {
        f"{m}.weight": delta_of(rng, "linear", r, TYPES["f32"], 1.0 + n) for n, (m, r) in enumerate(ranks.items())
    }
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig.from_pretrained(save(lora_of(deltas, "hf"), Path(folder) / "x"))
    for n, (module, rank) in enumerate(ranks.items()):
        assert config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r) == rank
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
        assert alpha / (rank**0.5 if config.use_rslora else rank) == pytest.approx(1.0 + n, rel=1e-14, abs=0)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        assert sum(get_pattern_key([pattern], module) == pattern for module in ranks) == 1, pattern


def test_rslora_needs_no_patterns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deltas = {f"l.{r}.weight": delta_of(rng, "linear", r, TYPES["f32"], 16 / r**0.5) for r in (4, 8, 8)}
    config = json.loads((save(lora_of(deltas, "hf"), tmp_path / "x") / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["alpha_pattern"]) == (True, 16, {})


def test_what_an_adapter_says_of_itself_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lora = lora_of({"blk.0.attn_q.weight": delta_of(rng, "linear", 2, TYPES["f32"], 2.0)}, "gguf", arch="qwen2")
    said = {"adapter.lora.task_name": "tales", "adapter.lora.prompt_prefix": "Once "}
    norms = {"blk.0.attn_norm.weight": Factor.of(rng.standard_normal(32).astype(np.float32), "norm")}
    extras = {"norm": norms, "alora": {"invocation_tokens": (3, 1, 2)}}
    path = save(replace(lora, metadata={**lora.metadata, **said}, extras=extras, name="mine"), tmp_path / "x.gguf")
    again = load(path)
    wanted = said | {"general.architecture": "qwen2", "general.name": "mine", "general.type": "adapter"}
    assert wanted.items() <= again.metadata.items()
    np.testing.assert_array_equal(
        again.extras["norm"]["blk.0.attn_norm.weight"].array, norms["blk.0.attn_norm.weight"].array
    )
    assert again.extras["alora"] == {"invocation_tokens": (3, 1, 2)}


def test_an_adapter_made_in_memory_can_be_told_its_architecture(tmp_path: Path) -> None:
    lora = LoadedLora.from_tensors({"blk.0.attn_q.weight": (np.ones((2, 3)), np.ones((4, 2)))}, alpha=2)
    with pytest.raises(
        FormatError, match=r"the base's architecture is not known; .* say it, as in architecture='llama'"
    ):
        lora.save(tmp_path / "x.gguf")
    assert load(lora.save(tmp_path / "x.gguf", architecture="llama")).metadata["general.architecture"] == "llama"
    with pytest.raises(
        ArgumentError, match=r"architecture='qwen2' is for GGUF adapters that do not say .* says 'llama'"
    ):
        load(tmp_path / "x.gguf").save(tmp_path / "y.gguf", architecture="qwen2")
    with pytest.raises(ArgumentError, match="a PEFT folder has no such field"):
        lora.save(tmp_path / "y", architecture="llama")


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deltas = {n: delta_of(rng, k, 3, TYPES["f16"], 1.7) for n, k in GGUF_WEIGHTS.items()}
    one, two = (save(lora_of(deltas, "gguf"), tmp_path / f"{n}.gguf") for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


# ---- q8_0


def test_q8_0_is_within_half_a_step_and_rows_that_fill_no_block_are_f16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = {"blk.0.attn_q.weight": (64, 5), "blk.0.attn_k.weight": (64, 32), "token_embd.weight": (11, 32)}
    deltas = {}
    for name, (n_in, rank) in names.items():
        kind = "embedding" if name == "token_embd.weight" else "linear"
        a, b = rng.standard_normal((rank, n_in)), rng.standard_normal((96, rank))
        deltas[name] = LoraDelta(a.astype(np.float32), b.astype(np.float32), 0.37, kind)  # type: ignore[arg-type]
    path = save(lora_of(deltas, "gguf"), tmp_path / "x.gguf", dtype="q8_0")
    found, alpha, types = gguf_by_hand(path)
    assert types == {
        "blk.0.attn_q.weight.lora_a": "q8_0", "blk.0.attn_q.weight.lora_b": "f16",  # rows of 5
        "blk.0.attn_k.weight.lora_a": "q8_0", "blk.0.attn_k.weight.lora_b": "q8_0",
        "token_embd.weight.lora_a": "q8_0", "token_embd.weight.lora_b": "q8_0",  # A is (vocabulary, rank) in the file
    }  # fmt: skip
    assert alpha == 0
    for name, delta in deltas.items():
        for half, factor in (("a", delta.a), ("b", delta.b * 0.37)):
            if types[f"{name}.lora_{half}"] == "q8_0":
                rows = factor.T if (name, half) == ("token_embd.weight", "a") else factor
                blocks = rows.reshape(-1, 32)
                # A step is the block's largest value / 127, kept as f16: half a step, and what that f16 rounds away.
                step = np.abs(blocks).max(1, keepdims=True) / 127
                read = found[name][0 if half == "a" else 1]
                got = (read.T if rows is not factor else read).reshape(-1, 32)
                assert (np.abs(got - blocks) <= step * (0.5 + 127 * 2**-11 + 1e-3)).all(), f"{name}.{half}"
    again = save(load(path), tmp_path / "again.gguf")
    for one, two in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(again).tensors, strict=True):
        assert (one.name, one.tensor_type) == (two.name, two.tensor_type)
        assert one.data.tobytes() == two.data.tobytes(), f"{one.name} changed when saved again"


def test_a_q8_0_adapter_becomes_f32_in_a_peft_folder(tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    lora = lora_of({"blk.0.attn_q.weight": LoraDelta(a, b)}, "gguf")
    small = load(save(lora, tmp_path / "x.gguf", dtype="q8_0"))
    there = save(replace(small, naming="hf"), tmp_path / "folder")
    (delta,) = load(there).adapters.values()
    assert delta.a.dtype == np.float32
    np.testing.assert_array_equal(delta.a, small.adapters["blk.0.attn_q.weight"].a)


# ---- what a format cannot hold


def test_all_that_gguf_cannot_hold_is_one_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long = "blk.0." + "x" * 52 + ".weight"
    lora = lora_of({"blk.0.c.weight": delta_of(rng, "conv", 2, TYPES["f32"], 1.0), long: delta_of(
        rng, "linear", 2, TYPES["f32"], 1.0)}, "hf")  # fmt: skip
    one = Factor.of(np.ones(6, np.float32), "x")
    extras = {kind: {"blk.0.c.weight": one} for kind in ("dora", "lora_bias", "bias", "modules_to_save")}
    extras |= {"new_tokens": {"token_embd.weight": ((1,), one)}, "base_weight": {"token_embd.weight": one}}
    with pytest.raises(FormatError, match="lora cannot be written as GGUF: 9 problems") as caught:
        save(replace(lora, extras=extras), tmp_path / "x.gguf")
    said = caught.value.problems
    assert "its weights do not have GGUF names; convert it with convert_names(lora, base)" in said
    assert "weight blk.0.c.weight is a convolution, which GGUF adapters cannot hold" in said
    assert f"tensor {long}.lora_a: the name has 72 bytes, GGUF takes 63" in said
    for kind in ("dora", "lora_bias", "bias", "modules_to_save", "new_tokens"):
        assert any(line.startswith(f"{kind}: ") and f"without_extras({kind!r})" in line for line in said), kind
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("length", "fits"), [(63, True), (64, False)])
def test_a_tensors_name_has_up_to_63_bytes_as_llama_cpp_reads_them(tmp_path: Path, length: int, fits: bool) -> None:
    name = "blk.0." + "ä" * 10 + "x" * (length - len("blk.0.") - 20 - len(".weight.lora_a")) + ".weight"
    lora = lora_of({name: delta_of(np.random.default_rng(0), "linear", 2, TYPES["f32"], 1.0)}, "gguf")
    assert len(f"{name}.lora_a".encode()) == length
    if fits:
        assert list(load(save(lora, tmp_path / "x.gguf")).adapters) == [name]
    else:
        with pytest.raises(FormatError, match=r"lora_a: the name has 64 bytes, GGUF takes 63"):
            save(lora, tmp_path / "x.gguf")


def test_all_that_a_peft_folder_cannot_hold_is_one_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lora = lora_of({"blk.0.attn_q": delta_of(rng, "linear", 2, TYPES["f32"], 1.0)}, "gguf")
    norm = {f"blk.{n}.attn_norm.weight": Factor.of(np.ones(6, np.float32), "x") for n in (0, 1)}
    with pytest.raises(FormatError, match="lora cannot be written as a PEFT folder: 4 problems") as caught:
        save(replace(lora, extras={"norm": norm}), tmp_path / "x")
    assert caught.value.problems[0].startswith("its weights have GGUF names; convert it with convert_names(lora, base)")
    assert caught.value.problems[1].startswith("weight blk.0.attn_q: its name does not end with .weight")
    assert [line.split()[4] for line in caught.value.problems[2:]] == [
        "blk.0.attn_norm.weight;",
        "blk.1.attn_norm.weight;",
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_weights_is_not_written(tmp_path: Path) -> None:
    for naming, name in (("gguf", "x.gguf"), ("hf", "x")):
        with pytest.raises(FormatError, match="it has no weights"):
            save(lora_of({}, naming), tmp_path / name)


@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_every_factor_that_overflows_f16_is_listed(tmp_path: Path, naming: str, output: str) -> None:
    names = [f"blk.{n}.attn_q.weight" for n in range(3)]
    deltas = {n: LoraDelta(np.ones((1, 4), np.float32), np.full((5, 1), v, np.float32)) for n, v in zip(
        names, (1e5, 3.0, 7e4), strict=True)}  # fmt: skip
    with pytest.raises(FormatError, match=r"values up to 100000 do not fit float16; write it as f32 or bf16") as caught:
        save(lora_of(deltas, naming), tmp_path / output, dtype="f16")
    assert len(caught.value.problems) == 2
    assert "values up to 70000 do not fit float16" in caught.value.problems[1]
    assert list(tmp_path.iterdir()) == []


def test_a_folded_scaling_that_overflows_f16_is_an_error(tmp_path: Path) -> None:
    b = np.full((5, 1), 1000, np.float16)
    deltas = {f"blk.{n}.attn_q.weight": LoraDelta(np.ones((1, 4), np.float16), b, 100.0 * n) for n in (1, 2)}
    with pytest.raises(FormatError, match="values up to 100000 do not fit float16"):
        save(lora_of(deltas, "gguf"), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_every_factor_with_nan_is_listed(tmp_path: Path, naming: str, output: str) -> None:
    good, bad = np.ones((2, 2), np.float32), np.array([[1, np.nan], [np.inf, 1]], np.float32)
    tensors = {
        "blk.0.attn_q.weight": (bad, good),
        "blk.1.attn_q.weight": (good, bad),
        "blk.2.attn_q.weight": (good, good),
    }
    lora = replace(LoadedLora.from_tensors(tensors, naming=naming), metadata={"general.architecture": "llama"})  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="2 problems") as caught:
        save(lora, tmp_path / output)
    assert "blk.0.attn_q.weight.lora_A: 2 of 4 values are NaN or Inf" in caught.value.problems[0]
    assert "blk.1.attn_q.weight.lora_B: 2 of 4 values are NaN or Inf" in caught.value.problems[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("output", "dtype"), [("x.gguf", "f64"), ("x", "q8_0"), ("x", "int4")])
def test_a_type_that_cannot_be_written_is_refused_with_those_that_can(tmp_path: Path, output: str, dtype: str) -> None:
    naming = "gguf" if output == "x.gguf" else "hf"
    lora = lora_of({"blk.0.attn_q.weight": delta_of(np.random.default_rng(0), "linear", 2, TYPES["f32"], 1.0)}, naming)
    with pytest.raises(ArgumentError, match=f"dtype '{dtype}' cannot be written here; there are f32, f16, bf16"):
        save(lora, tmp_path / output, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_name_of_neither_format_is_refused(tmp_path: Path, ending: str) -> None:
    lora = lora_of({"l.weight": delta_of(np.random.default_rng(0), "linear", 2, TYPES["f32"], 1.0)}, "hf")
    with pytest.raises(ArgumentError, match=r"written as NAME\.gguf, or as a PEFT folder"):
        save(lora, tmp_path / f"x{ending}")


# ---- extras, written by PEFT itself


class Net(torch.nn.Module):
    """A little of everything that an adapter can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.lin = torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(self.lin(x)))


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "target_modules": ["lin", "conv", "emb"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "conv"]},
    "modules_to_save": {"modules_to_save": ["head"]},
    "bias": {"bias": "all"},
    "own bias": {"bias": "lora_only"},
    "new_tokens": {"trainable_token_indices": {"emb": [1, 4, 7]}},
    "base_weight": {"target_modules": ["emb", "lin"]},
    "rslora": {"use_rslora": True, "rank_pattern": {"lin": 3}, "target_modules": ["lin", "conv"]},
    "everything": {"use_dora": True, "modules_to_save": ["head"], "bias": "lora_only", "alpha_pattern": {"conv": 5},
                   "target_modules": ["lin", "conv"], "trainable_token_indices": {"emb": [0, 10]}},
}  # fmt: skip


def written_by_peft(folder: Path, case: str) -> tuple[torch.nn.Module, LoraConfig]:
    config = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["lin"]} | EXTRAS[case]))
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    return model.eval(), config


IDS = torch.tensor([[0, 1, 4, 7, 10, 3]])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two models of the same weights: where these lie in memory decides how a processor's kernels round."""
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EXTRAS)
def test_all_that_peft_wrote_comes_back_as_peft_wrote_it(tmp_path: Path, case: str) -> None:
    model, config = written_by_peft(tmp_path / "theirs", case)
    ours = save(load(tmp_path / "theirs"), tmp_path / "ours")
    again = LoraConfig.from_pretrained(ours)
    for field in ("modules_to_save", "trainable_token_indices", "bias", "use_dora", "lora_bias", "use_rslora"):
        assert getattr(again, field) == getattr(config, field), field
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", ours))
    assert sorted(one) == sorted(two)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
    with torch.no_grad():
        base, expected = Net().eval()(IDS), model(IDS)
        found = peft_model(Net(), [ours])(IDS)
    assert (expected - base).abs().max() > 0.01
    assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in EXTRAS if case not in ("plain", "rslora")])
def test_without_its_extras_peft_takes_the_low_rank_part_alone(tmp_path: Path, case: str) -> None:
    model, config = written_by_peft(tmp_path / "theirs", case)
    ours = save(load(tmp_path / "theirs").without_extras(), tmp_path / "ours")
    assert load(ours).extras == {}
    low_rank = ("r", "lora_alpha", "target_modules", "alpha_pattern")
    expected = get_peft_model(Net(), LoraConfig(**{field: getattr(config, field) for field in low_rank})).eval()
    endings = tuple(f"{half}.default{end}" for half in "AB" for end in ("", ".weight"))
    factors = {key: weight for key, weight in model.state_dict().items() if key.endswith(endings)}
    assert not expected.load_state_dict(factors, strict=False).unexpected_keys
    with torch.no_grad():
        assert_close(peft_model(Net(), [ours])(IDS), expected(IDS))


def test_invocation_tokens_go_through_both_formats(tmp_path: Path) -> None:
    delta = delta_of(np.random.default_rng(0), "linear", 2, TYPES["f32"], 1.0)
    for naming, output in (("gguf", "x.gguf"), ("hf", "x")):
        lora = lora_of({"blk.0.attn_q.weight": delta}, naming)
        tokens = {"alora": {"invocation_tokens": (5, 1)}}
        assert load(save(replace(lora, extras=tokens), tmp_path / output)).extras == tokens
        again = save(load(tmp_path / output).without_extras("alora"), tmp_path / f"again-{output}")
        assert load(again).extras == {}


def test_the_shared_adapters_come_back_as_they_were(shared: Path, tmp_path: Path) -> None:
    folders = [f for f in sorted((shared / "peft").iterdir()) if (f / "adapter_model.safetensors").is_file()]
    folders += sorted((shared / "stories260k/adapters").iterdir())
    for folder in folders:
        again = save(load(folder), tmp_path / folder.name)
        one, two = (load_file(f / "adapter_model.safetensors") for f in (folder, again))
        assert sorted(one) == sorted(two), folder.name
        assert all(torch.equal(tensor, two[key]) and tensor.dtype == two[key].dtype for key, tensor in one.items())
        assert {n: d.scaling for n, d in load(again).adapters.items()} == {
            n: d.scaling for n, d in load(folder).adapters.items()
        }
    assert len(folders) >= 10


def test_the_shared_gguf_adapters_come_back_as_they_were(shared: Path, tmp_path: Path) -> None:
    cases = shared / "gguf_cases"
    files = [
        *sorted((shared / "stories260k/gguf").iterdir()),
        *sorted(cases.glob("lora_*.gguf")),
        cases / "ok_norm.gguf",
    ]
    for file in files:
        again = save(load(file), tmp_path / file.name, recipe=False)
        one, two = (
            {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(f).tensors} for f in (file, again)
        )
        assert one == two, file.name
        assert {n: d.scaling for n, d in load(again).adapters.items()} == {
            n: d.scaling for n, d in load(file).adapters.items()
        }
    assert len(files) == 12


# ---- outputs that exist


def small(naming: str, seed: int = 0, size: int = 32) -> LoadedLora:
    rng = np.random.default_rng(seed)
    ab = rng.standard_normal((4, size)).astype(np.float32), rng.standard_normal((size, 4)).astype(np.float32)
    lora = LoadedLora.from_tensors({f"blk.{n}.attn_q.weight": ab for n in range(4)}, alpha=4, naming=naming)  # type: ignore[arg-type]
    return replace(lora, metadata={"general.architecture": "llama"})


def contents(path: Path) -> object:
    """All bytes at a path, to compare."""
    if path.is_dir():
        return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    return path.read_bytes() if path.exists() else None


#: What programs run apart begin with: no torch, no PEFT, so that they start at once.
PROGRAM = f"""
from __future__ import annotations
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from lorastack import LoadedLora, save
{inspect.getsource(small)}
{inspect.getsource(contents)}
"""


def run_apart(program: str, *arguments: object) -> str:
    """What the program prints."""
    words = [sys.executable, "-c", PROGRAM + program, *map(str, arguments)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def put(path: Path, what: str) -> None:
    if what == "folder":
        path.mkdir()
        (path / "adapter_config.json").write_text("mine")
    elif what == "file":
        path.write_text("mine")


@pytest.mark.parametrize("there", ["file", "folder"])
@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_an_output_that_exists_is_replaced_only_by_force(tmp_path: Path, naming: str, output: str, there: str) -> None:
    path = tmp_path / output
    put(path, there)
    before = contents(path)
    with pytest.raises(ArgumentError, match=r"exists; choose another name, or pass force=True$"):
        save(small(naming), path)
    assert contents(path) == before
    assert save(small(naming), path, force=True) == path
    assert_same(by_ours(load(path)), small(naming), None, folded=False)
    assert [p.name for p in tmp_path.iterdir()] == [output], "something else was left behind"


@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path, naming: str, output: str) -> None:
    for there in ("file", "folder", "nothing"):
        target, path = tmp_path / there, tmp_path / f"{there}-{output}"
        put(target, there)
        before = contents(target)
        path.symlink_to(target)
        with pytest.raises(ArgumentError, match="exists"):
            save(small(naming), path)
        save(small(naming), path, force=True)
        assert not path.is_symlink()
        assert_same(by_ours(load(path)), small(naming), None, folded=False)
        assert contents(target) == before


@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, naming: str, output: str) -> None:
    with pytest.raises(ArgumentError, match=r"the folder .*no does not exist; create it first"):
        save(small(naming), tmp_path / "no" / output)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_not_replaced_by_one_made_of_it(tmp_path: Path) -> None:
    for naming, output in (("gguf", "x.gguf"), ("hf", "x")):
        path = save(small(naming), tmp_path / output)
        before = contents(path)
        for made in (load(path), load(path).scaled(0.5), LoraStack([(load(path), 2.0)]).bake()):
            with pytest.raises(ArgumentError, match=f"{output} is not replaced: .*{output} is made use of"):
                save(made, path, force=True)
        assert contents(path) == before


# ---- writes that fail

LIMITED = """
import resource
from lorastack.files import OutputError
naming, output = sys.argv[1:]
lora = small(naming, 1, 4096)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(lora, Path(output), force=True)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("there", ["nothing", "file", "folder"])
@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_a_file_over_the_limit_leaves_all_as_it_was(tmp_path: Path, naming: str, output: str, there: str) -> None:
    path = tmp_path / output
    put(path, there)
    before = contents(path)
    said = run_apart(LIMITED, naming, path)
    assert said == f"{path}: could not be written, nothing was changed: File too large\n"
    assert contents(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ([] if there == "nothing" else [output])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_a_full_disk_leaves_all_as_it_was(tiny_disk: Path, naming: str, output: str) -> None:
    path = save(small(naming), tiny_disk / output)
    before = contents(path)
    for target in (path, tiny_disk / f"other-{output}"):
        with pytest.raises(OutputError, match="could not be written, nothing was changed: No space left on device"):
            save(small(naming, 1, 4096), target, force=True)
        assert contents(path) == before
        assert [p.name for p in tiny_disk.iterdir()] == [output]


REFUSED = """
from lorastack.files import OutputError, moves
moves._function = lambda: None  # as on a system without renameat2
naming, output, which = sys.argv[1], sys.argv[2], int(sys.argv[3])
lora, left = small(naming, 1), [which]
def refuse(event, _):
    if event == "os.rename":
        left[0] -= 1
        if left[0] == 0:
            raise PermissionError(1, "Operation not permitted")
sys.addaudithook(refuse)
try:
    save(lora, Path(output), force=True)
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_a_move_that_the_system_refuses_leaves_all_as_it_was(
    tmp_path: Path, naming: str, output: str, which: int
) -> None:
    # Over a folder there are two moves: the old one aside, the new one to its place.
    path = tmp_path / output
    put(path, "folder")
    before = contents(path)
    said = run_apart(REFUSED, naming, path, which)
    assert said == f"{path}: could not be written, nothing was changed: Operation not permitted\n"
    assert contents(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [output]


KILLED = """
import json, os, shutil, signal
from lorastack.files import check_output, moves
naming, folder, name, force = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "force"
if sys.argv[5] == "lacking":
    moves._function = lambda: None
old, new = small(naming, 1), small(naming, 2)
save(old, folder / name)
save(new, folder / ("whole-" + name))
olds, news = contents(folder / name), contents(folder / ("whole-" + name))
path = folder / "work" / name
states = []
for step in range(1000):
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    if force:
        save(old, path)
    child = os.fork()
    if not child:
        left = [step]
        def tick(*_):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)
        # Every file that is opened, made, moved or removed, and every tensor written, is a point to die at.
        sys.addaudithook(lambda event, _: tick() if event.startswith(("open", "os.", "shutil.", "tempfile.")) else None)
        save(new, path, force=force, progress=tick)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = contents(path)
    state = "old" if found == olds else "new" if found == news else "nothing" if found is None else "partial"
    if state == "nothing" and force:
        asides = [contents(p) for p in path.parent.glob(".*.partial/old/*")]
        state = "old, aside" if asides == [olds] else "lost"
    states.append(state)
    # Whoever writes there next finds it as it was, or as it should be, and nothing beside it.
    check_output(path, True)
    assert contents(path) in ((olds, news) if force else (None, news)), state
    assert {p.name for p in path.parent.iterdir()} <= {name}, list(path.parent.iterdir())
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
print(json.dumps(states))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("renameat2", ["there", "lacking"])
@pytest.mark.parametrize("force", ["force", "new"])
@pytest.mark.parametrize(("naming", "output"), [("gguf", "x.gguf"), ("hf", "x")])
def test_killed_at_any_point_no_partial_output_is_left(
    tmp_path: Path, naming: str, output: str, force: str, renameat2: str
) -> None:
    states = json.loads(run_apart(KILLED, naming, tmp_path, output, force, renameat2))
    assert len(states) > 15, "too few points to die at: the hook does not see the writing"
    start = "old" if force == "force" else "nothing"
    allowed = {start, "new"} | ({"old, aside"} if (output, force, renameat2) == ("x", "force", "lacking") else set())
    assert set(states) <= allowed, states
    assert (states[0], states[-1]) == (start, "new")


def test_writing_takes_the_memory_of_one_weight_not_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((32, 4096)).astype(np.float32)  # 512 KiB
    tensors = {f"blk.{n}.attn_q.weight": (one, one.T) for n in range(24)}
    for n in (1, 2):
        replace(LoadedLora.from_tensors(tensors, alpha=n), metadata={"general.architecture": "llama"}).save(
            tmp_path / f"{n}.gguf"
        )
    del tensors
    stack = LoraStack([(load(tmp_path / "1.gguf"), 0.7), (load(tmp_path / "2.gguf"), -0.3)])
    tracemalloc.start()
    save(stack.bake(), tmp_path / "both.gguf", recipe=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "both.gguf").stat().st_size > 48 << 20
    assert peak < 6 << 20, f"{peak >> 20} MiB for weights of 1 MiB each"
