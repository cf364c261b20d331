"""One home for what a base's weights are called: files, older saves and live models, checked against the live model."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorastack import LoadedLora, LoraStack, convert_names, load, save
from lorastack.base import open_base
from lorastack.base.experts import LAYERS
from lorastack.base.fit import misfits
from lorastack.core.factor import Factor
from lorastack.errors import LoraStackError
from lorastack.inspect import inspect
from lorastack.torch import attach
from tests.test_cli import Command, lorastack  # noqa: F401
from tests.torch.families import FAMILIES, adapter_for, folder_of, linear_weights, logits, made
from tests.torch.tiny import far


def agree(lora: LoadedLora, model: nn.Module, folder: Path) -> list[str]:
    """What the base in the folder says of the adapter; attach must say the same of the live model."""
    said = misfits(lora, open_base(folder))
    try:
        attach(copy.deepcopy(model), lora).detach()
        refused = False
    except LoraStackError:
        refused = True
    assert refused == bool(said), said
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_live_model_is_known_in_its_files(family: str, tmp_path: Path) -> None:
    model = made(family)
    base = open_base(folder_of(model, tmp_path))
    wanted = {
        name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False) if weight.dim() > 1
    }
    found = {name: base.own_name(name) for name in wanted}
    assert [name for name, own in found.items() if own is None] == []
    assert {name: base.shape_of(own) for name, own in found.items() if own} == wanted


def test_names_are_known_without_transformers_for_the_most_common_families(tmp_path: Path, monkeypatch) -> None:
    for family in ("llava", "paligemma", "qwen2_vl", "qwen3_moe", "olmoe", "phimoe", "qwen2", "opt", "gpt2", "t5"):
        model = made(family)
        base = open_base(folder_of(model, tmp_path / family))
        monkeypatch.setattr("lorastack.base.model.live_names", lambda config: None)
        names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight.dim() > 1]
        assert [name for name in names if base.own_name(name) is None] == [], family


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "phimoe"])
def test_experts_are_read_from_the_files_as_the_live_parameter(family: str, tmp_path: Path) -> None:
    model = made(family)
    base = open_base(folder_of(model, tmp_path))
    for name, weight in model.named_parameters():
        if "experts" in name:
            assert np.array_equal(base.weight(name), weight.detach().numpy()), name


#: Front of today's names -> what it was before transformers 4.52.
OLD = {"model.language_model": "language_model.model", "model.vision_tower": "vision_tower"}


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_names_from_before_transformers_4_52_are_todays(family: str, tmp_path: Path) -> None:
    model = made(family)
    folder = folder_of(model, tmp_path / "base")
    today = adapter_for(linear_weights(model, "q_proj"))
    old = today.with_weights_renamed(OLD)
    assert not set(old.adapters) & set(today.adapters)
    base, plain = logits(model), replace(old, history=())
    with attach(model, today):
        expected = logits(model)
    with attach(model, plain) as handle:
        assert set(handle.report.matched["made"]) == set(today.adapters)
        assert torch.equal(logits(model), expected)
    assert far(expected, base) > 1e-3
    assert agree(plain, model, folder) == agree(today, model, folder) == []
    baked = LoraStack([(plain, 0.5), (today, 0.5)]).bake(base=folder)
    assert set(baked.adapters) == set(today.adapters)


def experts_one_by_one(model: nn.Module, old_block: str, layers: dict[str, str]) -> tuple[LoadedLora, nn.Module]:
    """An adapter of single experts, and the model with its dense sum in its weights."""
    truth, factors = copy.deepcopy(model), {}
    rng = np.random.default_rng(1)
    for path, module in truth.named_modules():
        if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            continue
        half = module.gate_up_proj.shape[1] // 2
        places = {"gate": (module.gate_up_proj, slice(0, half)), "up": (module.gate_up_proj, slice(half, None)),
                  "down": (module.down_proj, slice(None))}  # fmt: skip
        for number in range(3):  # one expert is left out
            for part, (weight, rows) in places.items():
                n_out, n_in = weight[number, rows].shape
                a = rng.standard_normal((2, n_in)).astype(np.float32)
                b = 0.3 * rng.standard_normal((n_out, 2)).astype(np.float32)
                block = path.replace("mlp.experts", old_block)
                factors[f"{block}.{number}.{layers[part]}.weight"] = (a, b)
                with torch.no_grad():
                    weight[number, rows] += 3 * torch.from_numpy(b @ a)
    return LoadedLora.from_tensors(factors, alpha=6, name="experts", naming="hf"), truth


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "olmoe", "phimoe"])
def test_experts_one_by_one_are_the_dense_sum_in_one_parameter(family: str, tmp_path: Path) -> None:
    model = made(family)
    folder = folder_of(model, tmp_path / "base")
    old = family == "phimoe"
    layers = {part: names[old] for part, names in LAYERS.items()}
    lora, truth = experts_one_by_one(model, "block_sparse_moe.experts" if old else "mlp.experts", layers)
    with attach(model, lora):
        assert far(logits(model), logits(truth)) < 1e-5
    assert far(logits(model), logits(truth)) > 1e-2
    assert agree(lora, model, folder) == []
    # Settled in the base's files it is the same update, also through a file of its own.
    settled = convert_names(lora, open_base(folder), "hf")
    assert all(name.endswith(("gate_up_proj", "down_proj")) for name in settled.adapters)
    again = load(save(settled, tmp_path / "fused"))
    with attach(model, again):
        assert far(logits(model), logits(truth)) < 1e-5


def test_experts_in_one_parameter_fit_a_base_that_keeps_them_one_by_one() -> None:
    model = made("qwen3_moe")
    lora, _ = experts_one_by_one(model, "mlp.experts", {part: names[0] for part, names in LAYERS.items()})
    from lorastack.base import BaseModel
    from lorastack.base.settle import settle
    from lorastack.torch.places import Places

    fused = settle(lora, Places(model).as_base())
    singles = {f"{block}.{n}.{layer}.weight": (24, 32) if layer != "down_proj" else (32, 24)
               for block in {name.rpartition(".")[0] for name in fused.adapters} for n in range(4)
               for layer in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    back = settle(fused, BaseModel("old", "hf", None, {}, singles))
    assert set(back.adapters) == set(singles)
    for name, delta in lora.adapters.items():
        np.testing.assert_allclose(back.adapters[name].dense(), delta.dense(), rtol=1e-6, atol=1e-6)
    assert not any(back.adapters[name].dense().any() for name in set(singles) - set(lora.adapters))


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_backbone_saved_by_itself_fits_the_whole_model_and_the_other_way_round(family: str, tmp_path: Path) -> None:
    model = made(family)
    folder = folder_of(model, tmp_path / "base")
    whole = adapter_for(linear_weights(model, "q_proj"))
    backbone = replace(whole.with_weights_renamed({"model": ""}), history=())
    with attach(model, whole):
        expected = logits(model)
    with attach(model, backbone):
        assert torch.equal(logits(model), expected)
    assert agree(backbone, model, folder) == []
    assert convert_names(backbone, folder, "hf").adapters.keys() == whole.adapters.keys()
    assert agree(whole, model.model, folder_of(model.model, tmp_path / "backbone")) == []


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_text_adapter_is_told_where_it_would_fit_and_fits_there(family: str, tmp_path: Path) -> None:
    model = made(family)
    folder = folder_of(model, tmp_path / "base")
    text = [name for name in linear_weights(model, "proj") if ".language_model." in name]
    there = adapter_for({name: shape for name, shape in linear_weights(model, "proj").items() if name in text})
    lora = replace(there.with_weights_renamed({"model.language_model": "model"}), history=())
    hint = f"{len(text)} of {len(text)} would fit under model.language_model"
    assert hint in agree(lora, model, folder)[0]
    with pytest.raises(LoraStackError, match=hint):
        attach(model, lora)
    path = save(lora, tmp_path / "text")
    renamed = load(path, rename={"model": "model.language_model"})
    assert agree(renamed, model, folder) == []
    with attach(model, there):
        expected = logits(model)
    with attach(model, renamed):
        assert torch.equal(logits(model), expected)
    # What was done is kept in what is made of it.
    baked = save(LoraStack([(renamed, 1.0)]).bake(), tmp_path / "baked")
    recipe = load_file_metadata(baked)["lorastack.recipe"]
    (tmp_path / "again.toml").write_text(recipe)
    again = load(tmp_path / "again.toml")
    assert set(again.adapters) == set(there.adapters)


def load_file_metadata(folder: Path) -> dict[str, str]:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def packed(folder: Path, method: str) -> Path:
    """The folder's linear layers packed as GPTQ, AWQ, bitsandbytes (4 and 8 bits) and compressed-tensors store them."""
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")]:
        module, (n_out, n_in) = name.removesuffix(".weight"), state[name].shape
        plain = state.pop(name)
        if method in ("gptq", "awq"):
            state[f"{module}.qweight"] = torch.zeros(n_in // 8, n_out, dtype=torch.int32)
            state[f"{module}.qzeros"] = torch.zeros(1, n_out // 8, dtype=torch.int32)
            state[f"{module}.scales"] = torch.ones(1, n_out, dtype=torch.float16)
        elif method == "bitsandbytes":
            state[name] = torch.zeros(n_out * n_in // 2, 1, dtype=torch.uint8)
            state[f"{name}.absmax"] = torch.ones(4)
            state[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
        elif method == "int8":
            state[name], state[f"{module}.SCB"] = plain.to(torch.int8), torch.ones(n_out)
        else:
            state[f"{module}.weight_packed"] = torch.zeros(n_out, n_in // 8, dtype=torch.int32)
            state[f"{module}.weight_scale"] = torch.ones(n_out, 1)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "int8", "compressed-tensors"])
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_packed_weights_are_weights_of_a_shape_that_is_not_said(family: str, method: str, tmp_path: Path) -> None:
    model = made(family)
    base = open_base(packed(folder_of(model, tmp_path), method))
    lora = adapter_for(linear_weights(model, "q_proj"))
    assert inspect(lora, base).misfits == []
    wrong = adapter_for({"model.layers.9.self_attn.q_proj.weight": (32, 32)})
    assert inspect(wrong, base).misfits
    assert not any("scale" in name or "absmax" in name or "zeros" in name for name in base.shapes)
    if family == "qwen2":
        there = convert_names(lora, base, "gguf")
        assert sorted(there.adapters) == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "t5"])
def test_a_tied_head_has_a_name_of_its_own(family: str, tmp_path: Path) -> None:
    model = made(family) if family != "qwen2" else FAMILIES["qwen2"](tie_word_embeddings=True).eval()
    folder = folder_of(model, tmp_path / "base")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    lora = adapter_for({"lm_head.weight": (64, 32)})
    assert agree(lora, model, folder) == []
    assert list(LoraStack([(lora, 1.0)]).bake(base=folder).adapters) == ["lm_head.weight"]
    if family == "qwen2":
        with pytest.raises(LoraStackError, match=r"its GGUF has no output\.weight"):
            convert_names(lora, folder, "gguf")
        embedding = replace(lora, adapters={"model.embed_tokens.weight": _embedding()})
        with pytest.raises(LoraStackError, match="aborts on an update of it"):
            convert_names(embedding, folder, "gguf")


def _embedding():
    from lorastack import LoraDelta

    return LoraDelta(np.ones((2, 64), np.float32), np.ones((32, 2), np.float32), 1.0, "embedding")


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_extras_that_do_not_fit_are_said_by_both(family: str, tmp_path: Path) -> None:
    model = made(family)
    folder = folder_of(model, tmp_path / "base")
    weights = linear_weights(model, "q_proj")
    first = next(iter(weights))
    embedding = next(n for n, p in model.named_parameters() if "embed_tokens" in n)

    def factor(*shape: int) -> Factor:
        return Factor.of(np.ones(shape, np.float32), "extra")

    own = next(p for n, p in model.named_parameters() if n == embedding).detach().numpy()
    cases = {
        "a larger head": ({"modules_to_save": {"lm_head.weight": factor(70, 32)}}, r"\[70, 32\].*\[64, 32\]"),
        "its own head": ({"modules_to_save": {"lm_head.weight": factor(64, 32)}}, None),
        "a module that is nowhere": ({"modules_to_save": {"score.weight": factor(2, 32)}}, r"score\.weight is none"),
        "a bias of another width": ({"bias": {first.replace("weight", "bias"): factor(7)}}, r"\[7\]"),
        "tokens outside": ({"new_tokens": {embedding: ((70,), factor(1, 32))}}, "70 is outside the vocabulary of 64"),
        "tokens inside": ({"new_tokens": {embedding: ((3,), factor(1, 32))}}, None),
        "a DoRA magnitude": ({"dora": {first: factor(weights[first][0])}}, None),
        "the base's own embedding": ({"base_weight": {embedding: Factor.of(own, "own")}}, None),
        "another embedding": ({"base_weight": {embedding: factor(64, 32)}}, "trained on a changed base"),
        "invocation tokens": ({"alora": {"invocation_tokens": (1, 2)}}, None),
    }  # fmt: skip
    for label, (extras, word) in cases.items():
        said = agree(replace(adapter_for(weights), extras=extras), model, folder)
        assert bool(said) == (word is not None), label
        if word:
            assert re.search(word, said[0]), (label, said)


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_the_text_part_of_a_model_with_pictures_goes_to_gguf_and_back(family: str, tmp_path: Path) -> None:
    model = made(family)
    base = open_base(folder_of(model, tmp_path))
    text = {n: s for n, s in linear_weights(model, "q_proj").items() if ".language_model." in n}
    lora = adapter_for(text)
    there = convert_names(lora, base)
    assert sorted(there.adapters) == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    assert there.metadata["general.architecture"] == {"llava": "qwen2", "paligemma": "gemma"}[family]
    back = convert_names(there, base)
    assert set(back.adapters) == set(text)
    for name in text:
        np.testing.assert_array_equal(back.adapters[name].b, lora.adapters[name].b)
    pictures = adapter_for({n: s for n, s in linear_weights(model, "q_proj").items() if "vision" in n})
    with pytest.raises(LoraStackError, match=r"vision.* is not of the text part"):
        convert_names(pictures, base)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_experts_go_to_gguf_and_back(family: str, tmp_path: Path) -> None:
    model = made(family)
    base = open_base(folder_of(model, tmp_path))
    lora, truth = experts_one_by_one(model, "mlp.experts", {part: names[0] for part, names in LAYERS.items()})
    there = convert_names(lora, base)
    parts = [f"blk.{n}.ffn_{part}_exps.weight" for n in (0, 1) for part in ("gate", "up", "down")]
    assert sorted(there.adapters) == sorted(parts)
    for name, delta in lora.adapters.items():
        _, _, layer, *_, number, short, _ = name.split(".")
        found = there.adapters[f"blk.{layer}.ffn_{short.removesuffix('_proj')}_exps.weight"].dense()[int(number)]
        np.testing.assert_allclose(found, delta.dense(), rtol=1e-6, atol=1e-6)
    with attach(model, there):
        assert far(logits(model), logits(truth)) < 1e-5


def test_only_the_files_of_the_index_are_the_base(tmp_path: Path) -> None:
    model = made("qwen2")
    folder = folder_of(model, tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    assert "layers.0.attention.wq.weight" not in open_base(folder).shapes


def test_the_command_says_where_a_text_adapter_fits_and_takes_it_there(lorastack: Command, tmp_path: Path) -> None:  # noqa: F811
    model = made("llava")
    folder = folder_of(model, tmp_path / "vlm")
    there = adapter_for({n: s for n, s in linear_weights(model, "q_proj").items() if ".language_model." in n})
    path = save(there.with_weights_renamed({"model.language_model": "model"}), tmp_path / "text")
    refused = lorastack("inspect", path, "--base", folder)
    assert refused.code == 1
    assert "2 of 2 would fit under model.language_model; give --rename model=model.language_model" in refused.out
    taken = lorastack("inspect", path, "--base", folder, "--rename", "model=model.language_model")
    assert taken.code == 0
    baked = lorastack(
        "bake", path, "--rename", "model=model.language_model", "--base", folder, "-o", tmp_path / "baked"
    )
    assert baked.code == 0, baked.err
    assert set(load(tmp_path / "baked").adapters) == set(there.adapters)
    wrong = lorastack("inspect", path, "--rename", "nowhere=x")
    assert wrong.code == 1
    assert "no weight's name begins with" in wrong.err
