"""Keys of PEFT's weights as other programs save them: read as the adapter that PEFT itself saves, to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorastack import LoadedLora, load
from lorastack.core.factor import Factor
from lorastack.errors import FormatError
from lorastack.inspect import inspect

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WEIGHTS = "adapter_model.safetensors"
B = "base_model.model."


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=20,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            word_embed_proj_dim=16,
        )
    )


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "qwen2": (qwen2, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "opt": (opt, {"target_modules": ["q_proj", "fc1"], "lora_bias": True, "bias": "lora_only"}),
}


def trained(family: str, name: str = "default", **fields: Any) -> PeftModel:
    """A model with random factors and whatever else its config trains."""
    torch.manual_seed(3)
    make, options = FAMILIES[family]
    model = get_peft_model(make(), LoraConfig(r=3, lora_alpha=7, **{**options, **fields}), adapter_name=name)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    return model


def saved(family: str, folder: Path, **fields: Any) -> Path:
    """That model's adapter, as PEFT saves it."""
    trained(family, **fields).save_pretrained(folder, save_embedding_layers=False)
    return folder


def rekeyed(folder: Path, to: Path, change: Callable[[str], str]) -> Path:
    """The same adapter with its keys changed."""
    to.mkdir()
    (to / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    state = {change(key): value for key, value in load_file(folder / WEIGHTS).items()}
    assert set(state) != set(load_file(folder / WEIGHTS)), "keys that stay as they are prove nothing"
    save_file(state, to / WEIGHTS)
    return to


def check_same(got: LoadedLora, expected: LoadedLora) -> None:
    """The same updates and extras, to the bit."""
    assert set(got.adapters) == set(expected.adapters)
    for name, delta in expected.adapters.items():
        assert got.adapters[name].scaling == delta.scaling
        for one, other in zip(got.adapters[name].factors, delta.factors, strict=True):
            np.testing.assert_array_equal(one.array, other.array)
    assert {kind: set(values) for kind, values in got.extras.items()} == {
        kind: set(values) for kind, values in expected.extras.items()
    }
    for kind, values in expected.extras.items():
        for name, value in values.items():
            if isinstance(value, Factor):
                np.testing.assert_array_equal(got.extras[kind][name].array, value.array)


def named(name: str) -> Callable[[str], str]:
    """Put an adapter's name where PEFT keeps it while several are loaded."""
    part = r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?=\.|$)"
    return lambda key: re.sub(part, rf"\1.{name}", key).replace("lm_head.", f"lm_head.modules_to_save.{name}.")


FOREIGN_KEYS: dict[str, tuple[Callable[[str], str], str]] = {
    "default": (named("default"), "the adapter's name, default"),
    "another name": (named("style-2"), "the adapter's name, style-2"),
    "torch.compile": (lambda key: f"_orig_mod.{key}", "_orig_mod (torch.compile)"),
    "DataParallel": (lambda key: f"module.{key}", "module (DataParallel, DDP or DeepSpeed)"),
    "both, and again": (lambda key: f"module._orig_mod.module.{key}", "_orig_mod (torch.compile), module ("),
    "compiled inside": (lambda key: key.replace(B, f"{B}_orig_mod."), "_orig_mod (torch.compile)"),
    "FSDP on layers": (
        lambda key: re.sub(r"(\.\d+\.)", r"\1_fsdp_wrapped_module.", key),
        "_fsdp_wrapped_module (FSDP)",
    ),
    "on one layer only": (
        lambda key: key.replace(".1.", ".1._checkpoint_wrapped_module."),
        "_checkpoint_wrapped_module (activation checkpointing)",
    ),
    "FSDP, checkpoints and compile": (
        lambda key: "_orig_mod." + re.sub(r"(\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", key),
        "_fsdp_wrapped_module (FSDP)",
    ),
    "Lightning": (lambda key: f"model.{key}", "keys were saved under model;"),
    "no prefix": (lambda key: key.removeprefix(B), "keys lack base_model.model"),
    "no prefix, a name, compiled": (
        lambda key: "_orig_mod." + named("default")(key).removeprefix(B),
        "keys lack base_model.model",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", FOREIGN_KEYS)
def test_foreign_segments_of_keys_are_left_out_and_said(tmp_path: Path, family: str, how: str) -> None:
    change, said = FOREIGN_KEYS[how]
    plain = saved(family, tmp_path / "plain")
    lora = load(rekeyed(plain, tmp_path / "changed", change))
    check_same(lora, load(plain))
    assert said in "\n".join(inspect(lora).odd)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_wrapper_inside_otherwise_ordinary_keys_is_seen(tmp_path: Path, family: str) -> None:
    """Nothing else in the file is out of the ordinary, so that only the look at all names can find it."""
    plain = saved(family, tmp_path / "plain", use_dora=False, modules_to_save=None, lora_bias=False, bias="none")
    lora = load(rekeyed(plain, tmp_path / "changed", FOREIGN_KEYS["on one layer only"][0]))
    check_same(lora, load(plain))


def test_ordinary_keys_are_read_without_a_word(tmp_path: Path) -> None:
    for family in FAMILIES:
        lora = load(saved(family, tmp_path / family))
        assert not any("keys" in line or "left out" in line for line in inspect(lora).odd)


def test_what_torch_compile_and_data_parallel_save_is_read(tmp_path: Path) -> None:
    """The wrappers themselves, rather than what they are said to write."""
    plain = load(saved("opt", tmp_path / "plain"))
    for wrap in (torch.compile, nn.DataParallel):
        folder = tmp_path / wrap.__name__
        model = trained("opt")
        model.save_pretrained(folder)
        torch.save(wrap(model).state_dict(), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        check_same(load(folder), plain)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    plain = saved("gpt2", tmp_path / "plain")
    folder = rekeyed(plain, tmp_path / "two", lambda key: named("one" if ".0." in key else "other")(key))
    with pytest.raises(FormatError, match=r"the keys hold several adapters, .*one.*selected_adapters"):
        load(folder)


def test_two_keys_that_become_one_are_refused(tmp_path: Path) -> None:
    folder = saved("opt", tmp_path / "plain")
    state = load_file(folder / WEIGHTS)
    key = next(key for key in state if key.endswith("lora_A.weight"))
    save_file(state | {f"_orig_mod.{key}": torch.zeros(3, 16)}, folder / WEIGHTS)
    with pytest.raises(FormatError, match=f"tensors .* are for one place, {re.escape(key)}; keep one of them"):
        load(folder)


# ---- whole state dicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", [WEIGHTS, "model.safetensors", "pytorch_model.bin", "adapter_model.bin"])
def test_of_a_whole_state_dict_the_adapter_is_read(tmp_path: Path, family: str, file: str) -> None:
    model = trained(family, "style")
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    plain = tmp_path / "plain" / "style"
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if family == "gpt2":  # a tensor that two modules share is written once
        del state[f"{B}transformer.wte.base_layer.weight"]
    torch.save(state, folder / file) if file.endswith(".bin") else save_file(state, folder / file)
    lora = load(folder)
    check_same(lora, load(plain))
    count = len(state) - len(load_file(plain / WEIGHTS))
    assert any(line.startswith(f"{count} tensors of the base itself are left out") for line in inspect(lora).odd)


@pytest.mark.parametrize("outer", [("state_dict",), ("module",), ("state_dict", "model")])
def test_a_state_dict_inside_a_checkpoint_is_read(tmp_path: Path, outer: tuple[str, ...]) -> None:
    folder = saved("gpt2", tmp_path / "plain")
    plain = load(folder)
    state: dict[str, Any] = {f"model.{key}": value for key, value in load_file(folder / WEIGHTS).items()}
    for key in reversed(outer):
        state = {key: state, "epoch": 3}
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    (inside / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    torch.save(state, inside / "adapter_model.bin")
    lora = load(inside)
    check_same(lora, plain)
    assert f"the weights were saved under '{outer[0]}'; read from there" in inspect(lora).odd


def test_trained_tokens_are_read_out_of_a_whole_state_dict(tmp_path: Path) -> None:
    model = trained("qwen2", trainable_token_indices={"embed_tokens": [3, 5]}, modules_to_save=None)
    for folder in ("plain", "whole"):
        model.save_pretrained(tmp_path / folder, save_embedding_layers=False)
    plain = load(tmp_path / "plain")
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "whole" / WEIGHTS)
    lora = load(tmp_path / "whole")
    check_same(lora, plain)
    assert set(lora.extras) == {"dora", "new_tokens"}
    (got, expected) = (one.extras["new_tokens"]["model.embed_tokens.weight"] for one in (lora, plain))
    assert got[0] == expected[0] == (3, 5)
    np.testing.assert_array_equal(got[1].array, expected[1].array)


def test_buffers_of_the_base_that_are_no_floats_do_not_matter(tmp_path: Path) -> None:
    model = trained("gpt2")
    model.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state | {f"{B}transformer.h.0.attn.mask": torch.ones(2, dtype=torch.bool)}, tmp_path / WEIGHTS)
    assert len(load(tmp_path).adapters) == 3


# ---- saved modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_resized_vocabulary_in_saved_modules_is_read_as_peft_reads_it(
    tmp_path: Path, family: str, resize: bool
) -> None:
    torch.manual_seed(1)
    base = FAMILIES[family][0]()
    if resize:
        base.resize_token_embeddings(23)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    kept = next(m for n, m in model.named_modules() if n.endswith("embed_tokens")).modules_to_save["default"].weight
    lora = load(tmp_path)
    # PEFT writes the head along, and puts it in the model again: it may have rows that the base has not.
    head = {"lm_head.weight": base.lm_head.weight}
    name = next(name for name in lora.extras["modules_to_save"] if name not in head)
    assert set(lora.extras) == {"modules_to_save"}
    assert set(lora.extras["modules_to_save"]) == {name, *head}
    for own, value in {name: kept, **head}.items():
        np.testing.assert_array_equal(lora.extras["modules_to_save"][own].array, value.detach().numpy())
    assert any("original_module" in line for line in inspect(lora).odd)


def test_originals_are_left_out_and_said_and_unequal_twins_refused(tmp_path: Path) -> None:
    folder = saved("qwen2", tmp_path)
    state = load_file(folder / WEIGHTS)
    head = state[f"{B}lm_head.weight"]
    extra = {f"{B}lm_head.modules_to_save.weight": head.clone(), f"{B}lm_head.original_module.weight": head + 1}
    save_file(state | extra, folder / WEIGHTS)
    lora = load(folder)
    np.testing.assert_array_equal(lora.extras["modules_to_save"]["lm_head.weight"].array, head.numpy())
    assert "1 tensors of the base itself are left out, such as lm_head.original_module.weight" in inspect(lora).odd
    save_file(state | extra | {f"{B}lm_head.modules_to_save.weight": head * 2}, folder / WEIGHTS)
    with pytest.raises(FormatError, match=r"is a second modules_to_save of lm_head\.weight"):
        load(folder)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.lora_head = nn.Linear(6, 2)
        self.lora_mlp = nn.Sequential(nn.Linear(6, 2))


def test_a_saved_module_may_be_named_like_a_part_of_peft(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["lora_head", "lora_mlp"])
    model = get_peft_model(Named(), config)
    model.save_pretrained(tmp_path)
    net = model.base_model.model
    lora = load(tmp_path)
    assert set(lora.extras["modules_to_save"]) == {
        f"{name}.{part}" for name in ("lora_head", "lora_mlp.0") for part in ("weight", "bias")
    }
    for name, module in (("lora_head", net.lora_head), ("lora_mlp.0", net.lora_mlp)):
        kept = module.modules_to_save["default"]
        kept = kept if name == "lora_head" else kept[0]
        got = lora.extras["modules_to_save"][f"{name}.weight"].array
        np.testing.assert_array_equal(got, kept.weight.detach().numpy())


@pytest.mark.parametrize("key", ["q_proj.lora_C.weight", "q_proj.lora_A.x.y.weight", "_flat_param", "q_proj.lora_E"])
def test_what_looks_like_a_part_and_is_none_is_refused(tmp_path: Path, key: str) -> None:
    folder = saved("opt", tmp_path)
    save_file(load_file(folder / WEIGHTS) | {f"{B}model.layers.0.{key}": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(FormatError, match=f"{re.escape(key)} is no part of a PEFT LoRA adapter"):
        load(folder)


@pytest.mark.parametrize("where", ["lm_head.weight", "lora_A.weight", "lora_magnitude_vector"])
def test_a_tensor_that_zero3_left_empty_is_refused(tmp_path: Path, where: str) -> None:
    folder = saved("qwen2", tmp_path)
    state = load_file(folder / WEIGHTS)
    keys = [key for key in state if key.endswith(where)]
    save_file(state | {key: torch.ones(0) for key in keys}, folder / WEIGHTS)
    with pytest.raises(FormatError) as caught:
        load(folder)
    said = [line for line in caught.value.problems if "is empty" in line]
    assert len(said) == len(keys)
    assert all("ZeRO-3" in line and "zero_to_fp32" in line for line in said)


def test_the_config_of_these_tests_is_what_peft_wrote(tmp_path: Path) -> None:
    assert json.loads((saved("opt", tmp_path) / "adapter_config.json").read_text())["bias"] == "lora_only"
