"""Intruder dimensions against the SVD of the dense sum, the base's weights as they are read, and the cache."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorastack import LoraDelta, LoraStack, load
from lorastack.algebra import intruders as module
from lorastack.algebra.compare import IntruderSearch, compare
from lorastack.algebra.intruders import left_vectors, likenesses
from lorastack.algebra.lowrank import matrices
from lorastack.algebra.span import span
from lorastack.base import BaseModel, open_base
from lorastack.errors import NamingError, ShapeError, UnknownNameError, UnsupportedError
from tests.updates import adapter, dense, linear


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def dense_likenesses(weight: np.ndarray, update: np.ndarray, leading: int) -> np.ndarray:
    """By the definition: the largest cosine of each leading vector of the sum with any vector of the base."""
    base, sigma, _ = np.linalg.svd(weight)
    vectors, values, _ = np.linalg.svd(weight + update)
    base = base[:, : np.sum(sigma > 1e-6 * sigma[0])]
    leading = min(leading, int(np.sum(values > 1e-6 * values[0])))
    return np.abs(base.T @ vectors[:, :leading]).max(0)


def spectrum(rng: np.random.Generator, out: int, n_in: int, rank: int) -> np.ndarray:
    """A weight whose singular values are well apart, so that each vector means something."""
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (out, n_in))
    return (u * 0.9 ** np.arange(rank)) @ v.T


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(3, 24),
    n_in=st.integers(3, 24),
    rank=st.integers(1, 4),
    lost=st.integers(0, 2),
    strength=st.sampled_from([1e-3, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_likenesses_are_those_of_the_dense_sum(
    out: int, n_in: int, rank: int, lost: int, strength: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = spectrum(rng, out, n_in, min(out, n_in) - lost)
    delta = linear(rng, out, n_in, rank, strength)
    update = span(matrices([(1.0, delta)])[0])
    got = likenesses(left_vectors(weight), weight, update, 10)
    want = dense_likenesses(weight, dense(delta)[0], 10)
    # Two singular values of the sum that nearly agree leave their vectors open.
    values = np.linalg.svd(weight + dense(delta)[0], compute_uv=False)
    sharp = min(len(want), len(got))
    gaps = np.min(np.abs(values[:sharp, None] - values + np.eye(len(values))[:sharp] * 9), 1)
    np.testing.assert_allclose(got[:sharp][gaps > 1e-3], want[:sharp][gaps > 1e-3], atol=1e-3)


@pytest.mark.parametrize(("out", "n_in"), [(200, 160), (160, 200)])
@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_large_weights_find_the_same_by_products(
    out: int, n_in: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_whole", lambda matrix, count: pytest.fail("it did not settle"))
    rng = np.random.default_rng(0)
    weight = spectrum(rng, out, n_in, 150)
    delta = linear(rng, out, n_in, 3, strength * 0.1)
    got = likenesses(left_vectors(weight), weight, span(matrices([(1.0, delta)])[0]), 6)
    np.testing.assert_allclose(got, dense_likenesses(weight, dense(delta)[0], 6), atol=1e-4)


def test_a_strong_update_intrudes_and_a_weak_one_does_not() -> None:
    rng = np.random.default_rng(0)
    weight = spectrum(rng, 60, 50, 50)
    left, delta = left_vectors(weight), linear(rng, 60, 50, 2, 1.0)
    search = IntruderSearch()
    assert search.count(left, weight, span(matrices([(1.0, delta)])[0])) == (2, 10)
    assert search.count(left, weight, span(matrices([(1e-6, delta)])[0])) == (0, 10)
    assert search.count(left, weight, span(matrices([(0.0, delta)])[0])) == (0, 10)
    assert IntruderSearch(leading=1, epsilon=0.0).count(left, weight, span(matrices([(1.0, delta)])[0])) == (0, 1)


def gpt2(folder: Path, dtype: type = np.float32, prefix: str = "") -> dict[str, np.ndarray]:
    """A base whose one square layer is GPT-2's Conv1D, stored [in, out], with an embedding; returned in float64."""
    rng = np.random.default_rng(1)
    names = {f"{prefix}h.0.attn.c_proj.weight": (6, 6), f"{prefix}h.0.attn.c_attn.weight": (6, 18),
             f"{prefix}wte.weight": (11, 6)}  # fmt: skip
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in names.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2}')
    return {name: array.astype(np.float64) for name, array in weights.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_weights_are_turned_to_what_the_update_adds_to(tmp_path: Path, dtype: type, prefix: str) -> None:
    weights = gpt2(tmp_path, dtype, prefix)
    base = open_base(tmp_path)
    rng = np.random.default_rng(2)
    wte = LoraDelta(rng.standard_normal((2, 11)), rng.standard_normal((6, 2)), kind="embedding")
    deltas = {"h.0.attn.c_proj": linear(rng, 6, 6, 2), "h.0.attn.c_attn": linear(rng, 18, 6, 2), "wte": wte}
    for name, delta in deltas.items():
        stored = weights[f"{prefix}{name}.weight"]
        got = base.weight(f"transformer.{name}.weight")
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, stored)
        np.testing.assert_array_equal(base.weight_of(f"transformer.{name}.weight", delta), stored.T[None])
    lora = adapter("x", **{f"transformer.{name}.weight": delta for name, delta in deltas.items()})
    found = compare(LoraStack([(lora, 0.5)]), base)
    want = [np.linalg.norm(dense(d, 0.5)) / np.linalg.norm(weights[f"{prefix}{n}.weight"]) for n, d in deltas.items()]
    np.testing.assert_allclose([one.relative for one in found.adapters[0].weights], want)
    whole = np.sqrt(sum(np.sum(array**2) for array in weights.values()))
    assert found.adapters[0].relative == pytest.approx(found.adapters[0].norm / whole)
    for one, (name, delta) in zip(found.adapters[0].weights, deltas.items(), strict=True):
        likeness = dense_likenesses(weights[f"{prefix}{name}.weight"].T, dense(delta, 0.5)[0], 10)
        assert (one.intruders, one.examined) == (np.sum(likeness < 0.5), len(likeness))
    with pytest.raises(ShapeError, match=r"\[6, 18\] in the base, this adapter changes \[18, 6\]"):
        base.weight_of("transformer.h.0.attn.c_attn.weight", linear(rng, 6, 18, 1))


def test_experts_and_quantised_gguf_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain, experts = rng.standard_normal((4, 64)).astype(np.float32), rng.standard_normal((2, 5, 32), np.float32)
    writer = gguf.GGUFWriter(str(tmp_path / "base.gguf"), "llama")
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(plain, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.add_tensor("blk.0.ffn_up_exps.weight", experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base(tmp_path / "base.gguf")
    np.testing.assert_allclose(base.weight("blk.0.attn_q.weight"), plain, atol=0.02)
    delta = LoraDelta(rng.standard_normal((2, 1, 32)), rng.standard_normal((2, 5, 1)))
    np.testing.assert_array_equal(base.weight_of("blk.0.ffn_up_exps.weight", delta), experts)
    found = compare(LoraStack([(adapter("x", **{"blk.0.ffn_up_exps.weight": delta}), 1.0)]), base)
    one = found.adapters[0].weights[0]
    likeness = np.concatenate([dense_likenesses(w, d, 10) for w, d in zip(experts, dense(delta), strict=True)])
    assert (one.intruders, one.examined) == (np.sum(likeness < 0.5), 10)
    assert one.relative == pytest.approx(np.linalg.norm(dense(delta)) / np.linalg.norm(experts))


def test_a_base_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    weights = gpt2(tmp_path)
    base = open_base(tmp_path)
    with pytest.raises(UnknownNameError, match=r"weight nothing cannot be read; it has no such weight"):
        base.weight("nothing")
    name = "transformer." + next(iter(weights))
    with pytest.raises(UnknownNameError, match=r"it is in memory only, open it with open_base\(path\)"):
        BaseModel("m", "hf", None, {}, base.shapes).weight(name)
    with pytest.raises(UnsupportedError, match="quantization_config"):
        BaseModel("m", "hf", None, {"quantization_config": {"bits": 4}}, base.shapes, base.stored).weight(name)
    stack = LoraStack(
        [(adapter("x", **{"transformer.h.0.mlp.c_fc.weight": linear(np.random.default_rng(0), 3, 2, 1)}), 1.0)]
    )
    with pytest.raises(NamingError, match=r"x: weight transformer.h.0.mlp.c_fc.weight is none of the base's 3 weights"):
        compare(stack, base)


def test_the_bases_vectors_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gpt2(tmp_path)
    name = "transformer." + next(iter(weights))
    stack = LoraStack([(adapter("x", **{name: linear(np.random.default_rng(0), 6, 6, 2)}), 1.0)])
    calls: list[Any] = []
    monkeypatch.setattr(module, "left_vectors", lambda w: calls.append(w) or left_vectors(w))
    first = compare(stack, tmp_path)
    kept = list(module.cache_folder().iterdir())
    assert [path.suffix for path in kept] == [".npz"]
    assert module.cache_folder().is_relative_to(os.environ["XDG_CACHE_HOME"])
    assert compare(stack, tmp_path).to_dict() == first.to_dict()
    assert len(calls) == 1
    kept[0].write_bytes(b"PK damaged")
    assert compare(stack, tmp_path).to_dict() == first.to_dict()
    assert len(calls) == 2, "a damaged file is made anew"
    compare(stack, tmp_path, intruders=IntruderSearch(cache=None))
    assert len(calls) == 3
    changed = {key: 2 * array for key, array in load_file(tmp_path / "model.safetensors").items()}
    save_file(changed, tmp_path / "model.safetensors")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    compare(stack, tmp_path)
    assert len(calls) == 4, "a base that was written since is another one"
    assert compare(stack, tmp_path, intruders=None).adapters[0].intruders is None
    assert len(calls) == 4


def test_real_adapters_on_their_base(shared: Path) -> None:
    folder = shared / "stories260k"
    loras = [load(folder / "adapters" / name) for name in ("excited", "zara")]
    found = compare(LoraStack([(lora, 1.0) for lora in loras]), folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    for lora, one in zip(loras, found.adapters, strict=True):
        updates = {name: dense(delta)[0] for name, delta in lora.adapters.items()}
        norms = [np.sqrt(sum(np.sum(x[n].astype(np.float64) ** 2) for n in updates)) for x in (updates, weights)]
        assert one.relative == pytest.approx(norms[0] / norms[1])
        likeness = [dense_likenesses(weights[name].astype(np.float64), update, 10) for name, update in updates.items()]
        assert one.intruders == sum(int(np.sum(x < 0.5)) for x in likeness)
        assert one.examined == 10 * len(updates)
    in_gguf = [load(folder / "gguf" / f"{name}.f32.gguf") for name in ("excited", "zara")]
    other = compare(LoraStack([(lora, 1.0) for lora in in_gguf]), folder / "base.gguf")
    for i, j in itertools.product(range(2), range(2)):
        assert other.cosine[i, j] == pytest.approx(found.cosine[i, j], abs=1e-6)
    assert [one.intruders for one in other.adapters] == [one.intruders for one in found.adapters]
    converted = compare(LoraStack([(lora, 1.0) for lora in in_gguf]), folder / "base")
    assert [one.relative for one in converted.adapters] == pytest.approx([one.relative for one in found.adapters])
