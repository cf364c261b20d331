"""What was merged comes back: the adapter out of a merged model and its base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorastack import LoadedLora, LoraStack, extract, load, merge, save
from lorastack.core.delta import LoraDelta
from lorastack.errors import LoraStackError
from lorastack.torch import attach
from tests.extract.models import MAKE, adapter, base_of, dense, far, plain
from tests.torch.tiny import far as far_logits
from tests.torch.tiny import tokens


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def opened(folder: Path) -> torch.nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_extract_of_a_merge_gives_the_adapter_back(name: str, exact: bool, tmp_path: Path) -> None:
    base, made = base_of(name, tmp_path / "base"), adapter(name)
    merge(base, made, tmp_path / "merged")
    found = extract(tmp_path / "merged", base, rank=3, exact=exact)
    assert set(found.adapters) == set(made.adapters)
    for weight, delta in made.adapters.items():
        again = found.adapters[weight]
        assert (again.rank, again.kind, again.scaling) == (3, delta.kind, 1.0)
        assert far(dense(again), dense(delta)) < 1e-5
        # U √S and √S Vᵀ: both sides weigh the same
        assert np.allclose(np.linalg.norm(again.b, axis=-2), np.linalg.norm(again.a, axis=-1), rtol=1e-4)
    assert found.made["error"] < 1e-5
    assert set(found.made["errors"]) == set(made.adapters)
    assert "rest" not in found.made


@pytest.mark.parametrize("name", MAKE)
def test_the_saved_adapter_on_the_base_is_the_fine_tune(name: str, tmp_path: Path) -> None:
    base, made = base_of(name, tmp_path / "base"), adapter(name)
    merge(base, made, tmp_path / "merged")
    save(extract(tmp_path / "merged", base, rank=3), tmp_path / "out")
    wanted, model = logits(opened(tmp_path / "merged")), opened(base)
    assert far_logits(logits(model), wanted) > 1e-2
    with attach(model, LoraStack([(load(tmp_path / "out"), 1.0)])):
        assert far_logits(logits(model), wanted) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert far_logits(logits(PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()), wanted) < 1e-4


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_narrow_types_are_compared_in_float32(kind: torch.dtype, tmp_path: Path) -> None:
    base, made = base_of("llama", tmp_path / "base"), adapter("llama")
    for file in base.glob("*.safetensors"):
        save_file({key: value.to(kind) for key, value in load_file(file).items()}, file, {"format": "pt"})
    merge(base, made, tmp_path / "merged")
    found = extract(tmp_path / "merged", base, rank=3)
    for weight, delta in made.adapters.items():
        assert far(dense(found.adapters[weight]), dense(delta)) < 0.02
        assert found.adapters[weight].a.dtype == np.float32


def _changed(base: Path, folder: Path, *endings: str, **config: object) -> Path:
    """A copy of the base, with these weights changed at random."""
    torch.manual_seed(1)
    model = opened(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(endings):
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_the_rest_is_listed_and_saved_whole(tied: bool, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=tied, attention_bias=True)
    endings = ("0.self_attn.q_proj.weight", "0.self_attn.k_proj.bias", "model.norm.weight", "embed_tokens.weight")
    tuned = _changed(base, tmp_path / "tuned", *endings)
    plainly = extract(tuned, base, rank=32)
    rest = {"model.layers.0.self_attn.k_proj.bias", "model.norm.weight", "model.embed_tokens.weight"}
    assert set(plainly.made["rest"]) == rest
    assert plainly.made["rest"]["model.norm.weight"] == pytest.approx(0.3, rel=0.3)
    assert not plainly.extras
    save(extract(tuned, base, rank=32, save_rest=True), tmp_path / "out")
    wanted, model = logits(opened(tuned)), opened(base)
    with attach(model, LoraStack([(load(tmp_path / "out"), 1.0)])):
        assert far_logits(logits(model), wanted) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert far_logits(logits(PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()), wanted) < 1e-4


def test_layer_norms_of_gpt2_are_saved_with_their_bias(tmp_path: Path) -> None:
    base = base_of("gpt2", tmp_path / "base")
    tuned = _changed(base, tmp_path / "tuned", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias", "ln_f.weight")
    save(extract(tuned, base, rank=32, save_rest=True), tmp_path / "out")
    wanted, model = logits(opened(tuned)), opened(base)
    with attach(model, LoraStack([(load(tmp_path / "out"), 1.0)])):
        assert far_logits(logits(model), wanted) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_as_low_rank_updates(tied: bool, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=tied)
    tuned = _changed(base, tmp_path / "tuned", "0.self_attn.q_proj.weight", "embed_tokens.weight", "lm_head.weight")
    found = extract(tuned, base, rank=32, embeddings=True)
    assert {name: delta.kind for name, delta in found.adapters.items()} == {
        "model.layers.0.self_attn.q_proj.weight": "linear",
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "linear",
    }
    save(found, tmp_path / "out")
    wanted, model = logits(opened(tuned)), opened(base)
    with attach(model, LoraStack([(load(tmp_path / "out"), 1.0)])):
        assert far_logits(logits(model), wanted) < 1e-4


def test_a_resized_vocabulary_is_listed_and_saved(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    model = opened(base)
    model.resize_token_embeddings(67)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    found = extract(tmp_path / "tuned", base, rank=1, save_rest=True)
    assert found.made["reshaped"] == {name: [[64, 32], [67, 32]] for name in found.extras["modules_to_save"]}
    save(found, tmp_path / "out")
    merge(base, load(tmp_path / "out"), tmp_path / "merged")
    assert far_logits(logits(opened(tmp_path / "merged")), logits(model)) < 1e-4


def test_a_classifier_trained_from_a_model_that_writes(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    made = extract(tmp_path / "tuned", base, rank=1).made
    assert made["ranks"] == {"model.layers.0.self_attn.q_proj.weight": 1}
    assert (made["added"], made["missing"]) == (["score.weight"], ["lm_head.weight"])


def test_no_difference_is_an_error(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    with pytest.raises(LoraStackError, match=r"no linear layer of .* differs"):
        extract(base, base, rank=2)


@pytest.mark.parametrize(
    ("weight", "delta", "shape", "config"),
    [
        ("h.0.conv.weight", ((2, 6, 3), (20, 2, 1)), (20, 6, 3), {}),
        ("h.0.conv.weight", ((2, 6, 3, 3), (20, 2, 1, 1)), (20, 6, 3, 3), {}),
        # Experts that are kept [E, in, out], square ones too, which do not say it by their shape
        (
            "model.m.experts.gate_up_proj",
            ((3, 2, 12), (3, 20, 2)),
            (3, 12, 20),
            {"architectures": ["GptOssForCausalLM"]},
        ),
        ("model.m.experts.down_proj", ((3, 2, 12), (3, 12, 2)), (3, 12, 12), {"architectures": ["GptOssForCausalLM"]}),
        ("model.m.experts.down_proj", ((3, 2, 12), (3, 12, 2)), (3, 12, 12), {"architectures": ["MixtralForCausalLM"]}),
    ],
)
def test_other_kinds_of_weights_come_back(
    weight: str, delta: Any, shape: tuple[int, ...], config: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(side, np.float32) for side in delta)
    made = LoadedLora.from_tensors(
        {weight: LoraDelta(a, b, 1.0, "conv" if "conv" in weight else "experts")}, naming="hf"
    )
    base = plain(tmp_path / "base", {weight: rng.standard_normal(shape, np.float32)}, **config)
    merge(base, made, tmp_path / "merged")
    again = extract(tmp_path / "merged", base, 2).adapters[weight]
    assert (again.kind, again.a.shape, again.b.shape) == (made.adapters[weight].kind, a.shape, b.shape)
    wide = [x.reshape(*x.shape[:1], -1) if again.kind == "conv" else x for x in (a, b, again.a, again.b)]
    assert far(wide[3].astype(np.float64) @ wide[2], wide[1].astype(np.float64) @ wide[0]) < 1e-5
