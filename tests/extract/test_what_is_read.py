"""What is read, listed and refused: cuts, seeds, shapes, types, memory, and models that do not belong together."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorastack import extract, load, merge, save
from lorastack.algebra.randomised import whole
from lorastack.base import BaseModel
from lorastack.base.roles import role_of
from lorastack.errors import (
    ArgumentError,
    FormatError,
    LoraStackError,
    NamingError,
    NonFiniteError,
    UnsupportedError,
)
from lorastack.extracting import update
from tests.extract.models import adapter, base_of, dense, far, plain

Q, NORM, TABLE = "h.0.q.weight", "h.0.norm.weight", "wte.weight"


def tensors(seed: int = 0, out: int = 300, n_in: int = 200, layers: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {TABLE: rng.standard_normal((9, n_in), np.float32), NORM: np.ones(n_in, np.float32)}
    for n in range(layers):
        found[f"h.{n}.q.weight"] = rng.standard_normal((out, n_in), np.float32)
    return found


def pair(folder: Path, **changes: np.ndarray | None) -> tuple[Path, Path]:
    """(fine-tuned, base); what is named, with ``_`` for ``.``, is another in the first, or left out."""
    before = tensors()
    after = dict(before)
    for name, value in changes.items():
        key = name.replace("_", ".")
        after.pop(key, None)
        if value is not None:
            after[key] = value
    return plain(folder / "tuned", after), plain(folder / "base", before)


def noise(out: int = 300, n_in: int = 200, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, n_in), np.float32)


# ---- cuts


def test_the_error_is_that_of_the_factors_and_the_best_there_is(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, h_0_q_weight=tensors()[Q] + noise())
    change = load_file(tuned / "model.safetensors")[Q].astype(np.float64) - tensors()[Q]
    found = extract(tuned, base, 8)
    error = far(dense(found.adapters[Q]), change)
    sigma = np.linalg.svd(change, compute_uv=False)
    best = np.sqrt(np.sum(sigma[8:] ** 2) / np.sum(sigma**2))
    assert found.made["errors"][Q] == pytest.approx(error, rel=1e-5)
    assert found.made["error"] == pytest.approx(error, rel=1e-5)
    assert best <= error * (1 + 1e-6) < 1.001 * best
    assert extract(tuned, base, 8, exact=True).made["error"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("exact", [False, True])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, exact: bool, tmp_path: Path) -> None:
    spread = noise() @ np.diag(np.arange(1.0, 201) ** -0.7).astype(np.float32)
    tuned, base = pair(tmp_path, h_0_q_weight=tensors()[Q] + spread)
    sigma = np.linalg.svd(spread.astype(np.float64), compute_uv=False)
    kept = np.cumsum(sigma**2) / np.sum(sigma**2)
    found = extract(tuned, base, energy=energy, exact=exact)
    assert found.made["ranks"][Q] == 1 + int(np.argmax(kept >= energy))
    assert 1 - found.made["error"] ** 2 >= energy
    assert extract(tuned, base, energy=energy, rank=[2, 4, 64, 200]).adapters[Q].rank in (2, 4, 64, 200)


def test_a_seed_makes_the_same_adapter_again(tmp_path: Path) -> None:
    steep = noise() @ np.diag(np.arange(1.0, 201) ** -0.5).astype(np.float32)
    tuned, base = pair(tmp_path, h_0_q_weight=tensors()[Q] + steep)
    one, two, other = (extract(tuned, base, 2, seed=seed).adapters[Q] for seed in (0, 0, 1))
    assert one.a.tobytes() == two.a.tobytes()
    assert one.b.tobytes() == two.b.tobytes()
    assert one.a.tobytes() != other.a.tobytes()
    assert far(dense(one), dense(other)) < 0.2


# ---- what is listed


def test_what_changed_otherwise_is_listed(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "h_0_q_weight": tensors()[Q] + noise(),
        "h_0_norm_weight": np.full(200, 1.5, np.float32),
        "wte_weight": np.ones((11, 200), np.float32),
        "h_1_q_weight": noise(),
    }
    tuned, base = pair(tmp_path, **changes)
    save_file({**tensors(), "gone.weight": np.ones(2, np.float32)}, base / "model.safetensors")
    made = extract(tuned, base, 4).made
    assert made["rest"] == {NORM: pytest.approx(0.5)}
    assert made["reshaped"] == {TABLE: [[9, 200], [11, 200]]}
    assert made["added"] == ["h.1.q.weight"]
    assert made["missing"] == ["gone.weight"]
    whole = extract(tuned, base, 4, save_rest=True)
    assert whole.made["unsaved"] == ["h.1.q.weight"]
    assert set(whole.extras["modules_to_save"]) == {NORM, TABLE}
    assert whole.metadata["modules_to_save"] == ["h.0.norm", "wte"]
    save(whole, tmp_path / "out")
    assert set(load(tmp_path / "out").extras["modules_to_save"]) == {NORM, TABLE}


def test_what_did_not_change_is_left_out(tmp_path: Path) -> None:
    before = tensors(layers=3)
    after = {**before, "h.1.q.weight": before["h.1.q.weight"] + noise()}
    found = extract(plain(tmp_path / "tuned", after), plain(tmp_path / "base", before), 4)
    assert list(found.adapters) == ["h.1.q.weight"]
    assert "rest" not in found.made


def test_experts_one_by_one_and_in_one_parameter_are_the_same(tmp_path: Path) -> None:
    """A base as the hub has it against a fine-tune as transformers 5 has it live; one expert did not change."""
    rng = np.random.default_rng(0)
    block = "model.layers.0.mlp.experts"
    single = {
        f"{block}.{n}.{layer}.weight": rng.standard_normal((24, 32), np.float32)
        for n in range(4)
        for layer in ("gate_proj", "up_proj")
    }
    fused = np.stack(
        [np.concatenate([single[f"{block}.{n}.{one}.weight"] for one in ("gate_proj", "up_proj")]) for n in range(4)]
    )
    b, a = rng.standard_normal((4, 48, 2), np.float32), rng.standard_normal((4, 2, 32), np.float32)
    b[2] = 0
    base = plain(tmp_path / "base", single, model_type="qwen3_moe")
    tuned = plain(tmp_path / "tuned", {f"{block}.gate_up_proj": fused + b @ a}, model_type="qwen3_moe")
    (delta,) = extract(tuned, base, 2).adapters.values()
    assert (delta.kind, delta.num_experts) == ("experts", 4)
    assert far(dense(delta), b.astype(np.float64) @ a) < 1e-5
    assert not dense(delta)[2].any()


def test_roles() -> None:
    names = {
        "model.embed_tokens.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "embeddings.word_embeddings.weight": "embedding",
        "encoder.layer.0.output.weight": "linear",
        "token_embd.weight": "embedding",
        "embed_out.weight": "head",
        "embedding_hidden_mapping_in.weight": "linear",
        "lm_head.weight": "head",
        "output.weight": "head",
        "h.0.attn.q_proj.weight": "linear",
        "h.0.gate.weight": "linear",
        "m.gate.weight": "other",
        "h.0.attn.sinks": "other",
    }
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (4, 3))
    shapes |= {
        "m.experts.down_proj": (2, 4, 3),
        "norm.weight": (3,),
        "conv.weight": (4, 3, 2),
        "deep.weight": (4, 1, 2),
    }
    base = BaseModel("b", "hf", None, {}, shapes)
    found = {name: role_of(base, name) for name in shapes}
    others = {"m.experts.down_proj": "experts", "norm.weight": "other", "conv.weight": "conv", "deep.weight": "other"}
    assert found == names | others


# ---- GGUF


def test_gguf_models(demo: Path, tmp_path: Path) -> None:
    adapter = load(demo / "excited.gguf")
    merge(demo / "base.gguf", adapter, tmp_path / "tuned.gguf")
    found = extract(tmp_path / "tuned.gguf", demo / "base.gguf", max(d.rank for d in adapter.adapters.values()))
    assert (found.naming, set(found.adapters)) == ("gguf", set(adapter.adapters))
    save(found, tmp_path / "out.gguf")
    again = load(tmp_path / "out.gguf")
    for name, delta in adapter.adapters.items():
        assert far(dense(again.adapters[name]), dense(delta)) < 1e-3
    with pytest.raises(UnsupportedError, match="no place for whole weights"):
        extract(tmp_path / "tuned.gguf", demo / "base.gguf", 4, save_rest=True)
    with pytest.raises(UnsupportedError, match="give two of a kind"):
        extract(tmp_path / "tuned.gguf", demo / "base", 4)


# ---- memory


def test_one_difference_is_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 2000
    before = {f"h.{n}.q.weight": noise(size, size, n) for n in range(3)}
    after = {name: value + 0.1 * noise(size, size, 50) for name, value in before.items()}
    tuned, base = plain(tmp_path / "tuned", after), plain(tmp_path / "base", before)
    one = size * size * 4
    extract(tuned, base, 2)
    tracemalloc.start()
    extract(tuned, base, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The difference, a block of rows of each model in two types, and the sketches
    assert one < peak < 2 * one, peak / one


# ---- what is refused


def test_a_cut_is_needed(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    with pytest.raises(ArgumentError, match="give rank, energy or tolerance"):
        extract(tuned, base)
    with pytest.raises(ArgumentError, match="no linear layer"):
        extract(tuned, base, 4)


def test_another_architecture(tmp_path: Path) -> None:
    one = plain(tmp_path / "a", tensors(), architectures=["GPT2LMHeadModel"])
    two = plain(tmp_path / "b", tensors(), architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedError, match="another architecture"):
        extract(one, two, 4)
    named = plain(tmp_path / "e", tensors(), model_type="gpt2"), plain(tmp_path / "f", tensors(), model_type="llama")
    with pytest.raises(UnsupportedError, match=r"another architecture \('gpt2'\)"):
        extract(*named, 4)
    with pytest.raises(UnsupportedError, match="no weight in common"):
        extract(plain(tmp_path / "c", {"x.weight": noise()}), plain(tmp_path / "d", tensors()), 4)


def test_another_size_of_base_is_one_line_and_ten(tmp_path: Path) -> None:
    tuned = plain(tmp_path / "a", tensors(out=8, n_in=4, layers=12))
    base = plain(tmp_path / "b", tensors(out=8, n_in=6, layers=12))
    with pytest.raises(NamingError) as caught:
        extract(tuned, base, 4)
    assert "12 of 12 linear layers have other shapes" in str(caught.value)
    assert len(caught.value.problems) == 11


def test_both_damaged_models_are_named(tmp_path: Path) -> None:
    base, tuned = base_of("llama", tmp_path / "base"), base_of("llama", tmp_path / "tuned")
    next(iter(sorted(base.glob("*.safetensors")))).unlink()
    last = sorted(tuned.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(FormatError) as caught:
        extract(tuned, base, 4)
    assert "weights of its index are in no file" in str(caught.value)
    assert "cut short" in str(caught.value)


def test_quantised_models(tmp_path: Path) -> None:
    for name in ("tuned", "base"):
        plain(tmp_path / name, tensors(), quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedError) as caught:
        extract(tmp_path / "tuned", tmp_path / "base", 4)
    assert len(caught.value.problems) == 2
    assert "gptq" in str(caught.value)


def test_every_weight_with_nan_is_named(tmp_path: Path) -> None:
    after = tensors(layers=3)
    after["h.0.q.weight"] = after["h.0.q.weight"] + noise()
    after["h.1.q.weight"][3, 4] = np.nan
    after["h.2.q.weight"][3, 4] = np.inf
    after[NORM][0] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        extract(plain(tmp_path / "tuned", after), plain(tmp_path / "base", tensors(layers=3)), 4)
    assert [name for name in ("h.1.q", "h.2.q", NORM) if name in str(caught.value)] == ["h.1.q", "h.2.q", NORM]


def test_once_a_weight_failed_no_other_is_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = {name: value + np.float32(1) for name, value in tensors(layers=3).items()}
    after["h.1.q.weight"][0, 0] = np.nan
    seen: list[int] = []
    monkeypatch.setattr(update, "leading", lambda matrix, *_: seen.append(1) or whole(matrix, 1))
    with pytest.raises(NonFiniteError):
        extract(plain(tmp_path / "tuned", after), plain(tmp_path / "base", tensors(layers=3)), 4)
    assert len(seen) == 1


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    after = {**tensors(), Q: np.ones((300, 200), np.int8)}
    with pytest.raises(LoraStackError, match="no floating-point weight"):
        extract(plain(tmp_path / "tuned", after), plain(tmp_path / "base", tensors()), 4)


# ---- what is kept in the file


def test_the_file_says_how_it_was_made_and_no_model_is_replaced(tmp_path: Path) -> None:
    base, made = base_of("llama", tmp_path / "base"), adapter("llama")
    merge(base, made, tmp_path / "merged")
    found = extract(tmp_path / "merged", base, 3)
    save(found, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("base_model_name_or_path")) == (3, 3, None)
    again = load(tmp_path / "out")
    assert again.adapters.keys() == found.adapters.keys()
    (tmp_path / "tuned.safetensors").touch()
    with pytest.raises(ArgumentError, match=r"is not replaced|holds more"):
        save(found, tmp_path / "merged", force=True)
