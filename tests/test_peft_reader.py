"""PEFT folders, saved by the real peft library, against its own deltas and tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorastack import LoadedLora, load
from lorastack.errors import FormatError, NonFiniteError

# What PEFT says about the tiny nets here is no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

SMALL: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 10)
        self.o_proj = nn.Linear(10, 12, bias=False)


class Net(nn.Module):
    """One module of each kind that LoRA goes into; only its weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 12)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.conv1d = nn.Conv1d(6, 8, 3)
        self.conv2d = nn.Conv2d(6, 8, (3, 2))
        self.head = nn.Linear(12, 5)


def saved(base: nn.Module, folder: Path, config: LoraConfig, **options: Any) -> PeftModel:
    """``base`` with random factors of this config, saved by PEFT to ``folder``."""
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad or name.removeprefix("base_model.model.") not in before:
                value.add_(torch.randn_like(value))
    model.save_pretrained(folder, **options)
    return model


def updates(model: PeftModel, adapter: str = "default") -> dict[str, np.ndarray]:
    """Every weight that PEFT changes -> the change, as PEFT computes it, in float32 and ``[out, in]``."""
    model = copy.deepcopy(model).float()
    found = {}
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or not module.r.get(adapter):
            continue
        delta = module.get_delta_weight(adapter).detach().numpy()
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
        else:
            name = f"{path}.weight"
            if isinstance(module.get_base_layer(), nn.Embedding) or getattr(module, "fan_in_fan_out", False):
                delta = delta.T
        found[name] = delta
    return found


def check_updates(lora: LoadedLora, expected: dict[str, np.ndarray]) -> None:
    assert set(lora.adapters) == set(expected)
    for name, delta in expected.items():
        assert np.abs(delta).max() > 0.1, "an update that is no update would prove nothing"
        atol = 1e-6 * max(1.0, float(np.abs(delta).max()))
        np.testing.assert_allclose(lora.adapters[name].dense(), delta, rtol=0, atol=atol, err_msg=name)


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of the saved adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Add, replace or (None) take out tensors of the saved file."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in change.items():
        assert value is not None or key in tensors, key
        tensors[key] = value
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A saved adapter of rank 4, alpha 8 on q_proj and o_proj."""
    saved(Net(), tmp_path / "plain", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
    return tmp_path / "plain"


Q, OUT, B = "layers.{}.q_proj", "layers.{}.o_proj", "base_model.model."

# ---- the updates --------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha is no whole multiple of r": {"lora_alpha": 3, "r": 7},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.q_proj": 7, "o_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.q_proj": 5, "o_proj": 32}},
    "regex patterns": {
        "rank_pattern": {r"layers\.[01]\.o_proj": 6, r"^layers.2.*": 3},
        "alpha_pattern": {r".*\.(q|k)_proj": 11, r"^layers\.2\.o_proj": 1},
    },
    "a pattern that hits no end of a path": {"rank_pattern": {"layers.1": 7, "proj": 9}},
    # PEFT sorts the keys when it saves, so that order is the file's.
    "the first pattern that hits counts": {"alpha_pattern": {"q_proj": 2, "layers.0.q_proj": 6}},
    "patterns under rslora": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"layers.2.q_proj": 3},
    },
    "layers_to_transform": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": ["layers.1.q_proj"]},
    "target_modules as a regex": {"target_modules": r".*\.2\.(q|o)_proj"},
    "embedding": {"target_modules": ["emb"]},
    "Conv1d": {"target_modules": ["conv1d"]},
    "Conv2d": {"target_modules": ["conv2d"]},
    "all kinds together": {"target_modules": ["emb", "conv1d", "q_proj", "head"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "emb", "conv2d", "conv1d"]},
    "lora_bias": {"lora_bias": True},
    "bias of all": {"bias": "all"},
    "bias of the targeted": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=list(CONFIGS))
def test_every_update_is_pefts_own(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], **fields})
    saved(Net(), tmp_path / "mine", config)
    lora = load(tmp_path / "mine")
    check_updates(lora, updates(PeftModel.from_pretrained(Net(), tmp_path / "mine")))
    assert (lora.name, lora.naming, lora.alpha) == ("mine", "hf", config.lora_alpha)
    assert lora.rank == max(delta.rank for delta in lora.adapters.values())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16), (torch.float64, np.float64)],
    ids=str,
)
def test_factors_keep_the_type_of_the_file(tmp_path: Path, dtype: torch.dtype, stored: type) -> None:
    model = saved(Net().to(dtype), tmp_path, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "emb"]))
    lora = load(tmp_path)
    assert {half.dtype for d in lora.adapters.values() for half in (d.a, d.b)} == {np.dtype(stored)}
    check_updates(lora, updates(model))


def test_gpt2_conv1d_has_its_updates_as_out_by_in(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=24, n_positions=8))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = saved(base, tmp_path, config)
    lora = load(tmp_path)
    check_updates(lora, updates(model))
    assert lora.adapters["transformer.h.1.attn.c_attn.weight"].out_features == 36
    assert lora.adapters["transformer.h.1.mlp.c_proj.weight"].in_features == 48


EXPERTS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_hidden_layers=2, num_local_experts=4)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_hidden_layers=1, num_experts=4, moe_intermediate_size=10, head_dim=8)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_hidden_layers=1, num_local_experts=4, head_dim=8)),
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize(
    "parameters",
    [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"], ["gate_up_proj"], ["down_proj"]],
    ids="+".join,
)
def test_experts_of_target_parameters_are_pefts_own(tmp_path: Path, family: str, parameters: list[str]) -> None:
    named = [f"mlp.experts.{name}" for name in parameters]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=named)
    model = saved(EXPERTS[family](), tmp_path, config)
    expected = updates(model)
    if family == "gpt-oss":
        # Its parameters are [E, in, out] (is_transposed), which only the base tells; an update here is [E, out, in].
        expected = {n: d.swapaxes(-1, -2) if d.ndim == 3 else d for n, d in expected.items()}
    lora = load(tmp_path)
    check_updates(lora, expected)
    experts = lora.adapters[f"model.layers.0.mlp.experts.{parameters[0]}"]
    assert (experts.kind, experts.num_experts, experts.rank) == ("experts", 4, 3)


def test_rank_and_alpha_patterns_of_experts_are_looked_up_by_parameter(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 9},
    )
    model = saved(EXPERTS["mixtral"](), tmp_path, config)
    lora = load(tmp_path)
    check_updates(lora, updates(model))
    assert lora.adapters["model.layers.0.mlp.experts.down_proj"].rank == 2


def test_experts_with_fewer_factors_than_targets_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    saved(EXPERTS["qwen3"](), tmp_path, config)
    edit(tmp_path, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    with pytest.raises(FormatError, match=r"experts has fewer factors than target_parameters \['gate_up_proj', 'down"):
        load(tmp_path)


def test_one_adapter_of_several_is_the_one_loaded(tmp_path: Path) -> None:
    model = saved(Net(), tmp_path / "one", LoraConfig(r=4, target_modules=["q_proj"]))
    for name in ("style", "style2"):
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    model.save_pretrained(tmp_path / "all")
    check_updates(load(tmp_path / "all"), updates(model))
    check_updates(load(tmp_path / "all" / "style"), updates(model, "style"))
    assert load(tmp_path / "all", subfolder="style2").name == "style2"
    check_updates(load(tmp_path / "all", subfolder="style2"), updates(model, "style2"))


# ---- extras -------------------------------------------------------------------------------------


def arrays(values: Any) -> dict[str, np.ndarray]:
    return {name: factor.array for name, factor in values.items()}


def check_extra(lora: LoadedLora, kind: str, expected: dict[str, torch.Tensor]) -> None:
    assert set(lora.extras) == {kind}
    assert set(lora.extras[kind]) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(lora.extras[kind][name].array, tensor.detach().numpy(), err_msg=name)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def test_dora_magnitudes_are_extras(tmp_path: Path) -> None:
    targets = ["q_proj", "emb", "conv1d", "conv2d"]
    model = saved(Net(), tmp_path, LoraConfig(r=4, target_modules=targets, use_dora=True))
    expected = {f"{p}.weight": m.lora_magnitude_vector["default"].weight for p, m in lora_layers(model)}
    check_extra(load(tmp_path), "dora", expected)
    assert len(expected) == 6


def test_dora_magnitudes_under_their_older_name_are_the_same(tmp_path: Path) -> None:
    saved(Net(), tmp_path, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    new = arrays(load(tmp_path).extras["dora"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {f"{k}.weight" if k.endswith("lora_magnitude_vector") else k: v for k, v in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "adapter_model.safetensors")
    for name, array in arrays(load(tmp_path).extras["dora"]).items():
        np.testing.assert_array_equal(array, new.pop(name))
    assert new == {}


def test_biases_of_lora_b_are_extras(tmp_path: Path) -> None:
    model = saved(Net(), tmp_path, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_bias=True))
    check_extra(load(tmp_path), "lora_bias", {f"{p}.weight": m.lora_B["default"].bias for p, m in lora_layers(model)})


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("all", [Q.format(0), Q.format(1), Q.format(2), "conv1d", "conv2d", "head"]),
        ("lora_only", [Q.format(0), Q.format(1), Q.format(2)]),
    ],
)
def test_trained_biases_of_the_base_are_extras_under_the_bases_names(
    tmp_path: Path, which: Any, names: list[str]
) -> None:
    model = saved(Net(), tmp_path, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias=which))
    net = model.base_model.model
    check_extra(load(tmp_path), "bias", {f"{name}.bias": net.get_submodule(name).bias for name in names})


def test_saved_modules_are_extras_under_the_bases_names(tmp_path: Path) -> None:
    model = saved(Net(), tmp_path, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head", "conv1d"]))
    net = model.base_model.model
    expected = {
        f"{name}.{part}": getattr(net.get_submodule(name).modules_to_save["default"], part)
        for name in ("head", "conv1d")
        for part in ("weight", "bias")
    }
    check_extra(load(tmp_path), "modules_to_save", expected)


@pytest.mark.parametrize("indices", [[3, 1, 16], {"emb": [3, 1, 16]}], ids=["list", "by module"])
def test_trained_tokens_are_extras_with_their_ids(tmp_path: Path, indices: Any) -> None:
    class WithEmbeddings(Net):
        def get_input_embeddings(self) -> nn.Module:
            return self.emb

    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    model = saved(WithEmbeddings(), tmp_path, config, save_embedding_layers=False)
    rows = model.base_model.model.emb.token_adapter.trainable_tokens_delta["default"]
    lora = load(tmp_path)
    assert set(lora.extras) == {"new_tokens"}
    ids, factor = lora.extras["new_tokens"]["emb.weight"]
    assert ids == (3, 1, 16)
    assert rows.shape == (3, 12)
    np.testing.assert_array_equal(factor.array, rows.detach().numpy())


def test_an_embedding_saved_along_is_a_harmless_extra(tmp_path: Path) -> None:
    base = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1))
    model = saved(
        base, tmp_path, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), save_embedding_layers=True
    )
    lora = load(tmp_path)
    check_updates(lora, updates(model))
    weight = model.base_model.model.model.embed_tokens.base_layer.weight
    check_extra(lora, "base_weight", {"model.embed_tokens.weight": weight})


def test_invocation_tokens_of_an_activated_lora_are_an_extra(tmp_path: Path) -> None:
    saved(Net(), tmp_path, LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]))
    assert load(tmp_path).extras["alora"] == {"invocation_tokens": (5, 6)}


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        ({"use_dora": True}, {}, "use_dora is set, but layers.0.o_proj.weight has no dora"),
        ({}, {f"{Q.format(0)}.lora_magnitude_vector": 10}, "comes without use_dora"),
        (
            {"use_dora": True},
            {f"{Q.format(0)}.lora_magnitude_vector": 9},
            "the dora of layers.0.q_proj.weight is (9,), its lora_B has 10 rows",
        ),
        ({"lora_bias": True}, {}, "lora_bias is set, but layers.2.q_proj.weight has no lora_bias"),
        ({}, {f"{Q.format(0)}.lora_B.bias": 10}, "comes without lora_bias"),
        ({"lora_bias": True}, {f"{Q.format(0)}.lora_B.bias": 11}, "is (11,), its lora_B has 10 rows"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices is set, but no trainable_tokens_delta"),
        ({}, {"emb.token_adapter.trainable_tokens_delta": (2, 12)}, "rows of shape (2, 12)"),
        (
            {"trainable_token_indices": [1, 2, 3]},
            {"emb.token_adapter.trainable_tokens_delta": (2, 12)},
            "rows of shape (2, 12), adapter_config.json names the tokens [1, 2, 3]",
        ),
    ],
    ids=range(9),
)
def test_an_extra_that_does_not_fit_config_or_weight_is_refused(
    plain: Path, fields: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    edit(plain, **fields)
    retensor(plain, {B + key: torch.ones(shape) for key, shape in tensors.items()})
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)


# ---- the config ---------------------------------------------------------------------------------

REFUSED_FIELDS: dict[str, Any] = {
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "use_qalora": True,
    "layer_replication": [[0, 2], [1, 3]],
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_field_that_changes_the_update_in_an_unsupported_way_is_refused_by_name(plain: Path, field: str) -> None:
    edit(plain, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(FormatError, match=f"{field} is set: .*not supported"):
        load(plain)
    edit(plain, **{field: None})
    assert load(plain).num_adapters() == 6


@pytest.mark.parametrize("value", [3, "x", True, [1], {"a": 1}], ids=str)
def test_an_unknown_field_is_refused_with_the_way_out(plain: Path, value: Any) -> None:
    edit(plain, shiny_option=value)
    with pytest.raises(FormatError, match=r"shiny_option = .*field not known here.*pass ignore=\['shiny_option'\]"):
        load(plain)
    assert load(plain, ignore=["shiny_option"]).num_adapters() == 6


@pytest.mark.parametrize("value", [None, False, [], {}, 0, ""], ids=str)
def test_an_unknown_field_that_is_not_set_is_accepted(plain: Path, value: Any) -> None:
    edit(plain, shiny_option=value)
    assert load(plain).num_adapters() == 6


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LoraConfig) if f.name != "runtime_config"])
def test_every_field_of_the_installed_peft_is_known(plain: Path, field: str) -> None:
    edit(plain, **{field: {"some": "value"}}, shiny_option=1)
    with pytest.raises(FormatError) as caught:
        load(plain)
    unknown = [problem for problem in caught.value.problems if "not known here" in problem]
    assert all("shiny_option" in problem for problem in unknown)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r is 0, expected a whole number above 0"),
        ({"r": -4}, "r is -4"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is {'q_proj': None}"),
        ({"rank_pattern": {"q_(proj": 4}}, "rank_pattern has 'q_(proj', which is no regular expression"),
        ({"alpha_pattern": {"q{99999999999}": 4}}, "alpha_pattern has 'q{99999999999}'"),
        ({"alpha_pattern": {"(" * 900 + ")" * 900: 4}}, "alpha_pattern has '((((("),
        ({"rank_pattern": {"(?i)Q_PROJ": 4}}, "rank_pattern has '(?i)Q_PROJ', which is no regular expression"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters is 'experts.down_proj', expected a list"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
    ],
    ids=str,
)
def test_a_value_without_meaning_is_refused_with_what_it_is(plain: Path, fields: dict[str, Any], said: str) -> None:
    edit(plain, **fields)
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": NaN}', '"LORA"', "\x00", '{"r": 1' + "0" * 400 + "}"])
def test_a_config_that_is_no_json_object_is_refused(plain: Path, text: str) -> None:
    (plain / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json: it is (no JSON|empty)"):
        load(plain)


@pytest.mark.parametrize("field", ["r", "peft_type", "shiny_option", "rank_pattern", "init_lora_weights"])
@pytest.mark.parametrize("depth", [30, 900, 100_000])
def test_a_config_nested_without_end_is_refused(plain: Path, field: str, depth: int) -> None:
    (plain / "adapter_config.json").write_text(f'{{"{field}": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(FormatError, match=r"nested more than 20 deep|depth limit exceeded"):
        load(plain)


def test_a_pattern_for_every_module_of_a_large_model_opens_soon(plain: Path) -> None:
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(600)]
    tensors = {f"{B}{m}.lora_{part}.weight": torch.ones(2, 2) for m in modules for part in "AB"}
    save_file(tensors, plain / "adapter_model.safetensors")
    exact = ["^" + re.escape(module) for module in modules]
    edit(plain, r=4, rank_pattern=dict.fromkeys(exact, 2), alpha_pattern={k: n for n, k in enumerate(exact)})
    began = time.process_time()
    lora = load(plain)
    took = time.process_time() - began
    assert lora.adapters["model.layers.500.self_attn.q_proj.weight"].scaling == 250
    assert took < 3.0, "re keeps 512 patterns: compiled for every look-up, this takes half a minute"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_a_start_that_changed_the_base_is_refused_and_can_be_ignored(plain: Path, start: str) -> None:
    edit(plain, init_lora_weights=start)
    with pytest.raises(FormatError, match=f"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        load(plain)
    assert load(plain, ignore=["init_lora_weights"]).num_adapters() == 6


def test_pissa_saved_as_it_is_is_refused_and_converted_is_exact(tmp_path: Path) -> None:
    original = Net().head.weight.detach().clone()
    net = Net()
    net.head.weight.data.copy_(original)
    torch.manual_seed(0)
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["head"], init_lora_weights="pissa"))
    # PEFT compares with the start, which it wants saved as if it were an ordinary adapter.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value))
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(FormatError, match="init_lora_weights is 'pissa'"):
        load(tmp_path / "raw")
    lora = load(tmp_path / "converted")
    head = model.base_model.model.head
    trained = head.base_layer.weight + head.get_delta_weight("default")
    assert lora.rank == 8, "converted ones have twice the rank"
    np.testing.assert_allclose(
        lora.adapters["head.weight"].dense(), (trained - original).detach().numpy(), rtol=0, atol=1e-5
    )


# ---- tensors that do not fit ----------------------------------------------------------------------


def test_a_rank_in_the_config_that_is_not_the_arrays_is_refused(plain: Path) -> None:
    edit(plain, r=5)
    with pytest.raises(FormatError, match=r"layers.0.q_proj: lora_A is \(4, 12\), rank 4; .* says rank 5") as caught:
        load(plain)
    assert len(caught.value.problems) == 6, "every module is listed"


def test_a_rank_pattern_that_is_not_the_arrays_is_refused(plain: Path) -> None:
    edit(plain, rank_pattern={"layers.1.q_proj": 2})
    with pytest.raises(FormatError, match=r"layers.1.q_proj: lora_A is \(4, 12\), rank 4; .* says rank 2") as caught:
        load(plain)
    assert len(caught.value.problems) == 1


def test_halves_without_the_other_are_all_listed(plain: Path) -> None:
    retensor(plain, {f"{B}{Q.format(0)}.lora_B.weight": None, f"{B}{OUT.format(2)}.lora_A.weight": None})
    with pytest.raises(FormatError) as caught:
        load(plain)
    text = str(caught.value)
    assert "module layers.0.q_proj has lora_A but no lora_B" in text
    assert "module layers.2.o_proj has lora_B but no lora_A" in text
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        (f"{Q.format(0)}.lora_B.weight", (10, 3), "lora_A is (4, 12) and lora_B is (10, 3): rank 4 against 3"),
        (f"{Q.format(0)}.lora_B.weight", (10, 4, 1), "factors have 2 dimensions each"),
        (f"{Q.format(0)}.lora_A.weight", (4, 0), "a dimension is 0"),
        ("layers.0.q_proj.lora_C.weight", (4, 4), "no part of a PEFT LoRA adapter known here"),
        ("layers.0.q_proj.hada_w1_a", (4, 4), None),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(plain: Path, key: str, shape: tuple[int, ...], said: str | None) -> None:
    retensor(plain, {B + key: torch.ones(shape)})
    if said is None:
        # Any other name is a weight of the base's own, which attaching finds no place for.
        assert set(load(plain).extras["modules_to_save"]) == {key}
        return
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)
    assert key.rpartition(".lora")[0] in str(caught.value)


def test_tensors_of_other_types_are_refused(plain: Path) -> None:
    a = f"{B}{Q.format(0)}.lora_A.weight"
    retensor(plain, {a: torch.ones(4, 12, dtype=torch.int8), f"{B}head.weight": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert f"tensor {a} is I8, expected a float type" in str(caught.value)
    assert f"tensor {B}head.weight is I64, expected a float type" in str(caught.value)


def test_tensors_without_pefts_prefix_are_refused(plain: Path) -> None:
    retensor(plain, {f"model.{Q.format(0)}.lora_A.weight": torch.ones(4, 12)})
    with pytest.raises(FormatError, match=r"tensor model\.layers\.0\.q_proj\.lora_A\.weight is no part of"):
        load(plain)


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        (
            {},
            {f"{Q.format(0)}.lora_embedding_A": (4, 12), f"{Q.format(0)}.lora_embedding_B": (10, 4)},
            f"weight layers.0.q_proj.weight has two updates, by {B}layers.0.q_proj.lora_A.weight and "
            f"{B}layers.0.q_proj.lora_embedding_A",
        ),
        (
            {"bias": "all"},
            {f"{Q.format(0)}.bias": (10,), f"{Q.format(0)}.base_layer.bias": (10,)},
            "is a second bias of layers.0.q_proj.bias",
        ),
        ({}, {"head.weight": (2,), "head.modules_to_save.weight": (2,)}, "is a second modules_to_save of head.weight"),
    ],
    ids=["updates", "biases", "saved modules"],
)
def test_two_tensors_for_one_place_are_refused(
    plain: Path, fields: dict[str, Any], tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    edit(plain, **fields)
    retensor(plain, {B + key: torch.full(shape, float(n)) for n, (key, shape) in enumerate(tensors.items())})
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)


def test_an_adapter_without_updates_is_refused(plain: Path) -> None:
    save_file({f"{B}head.weight": torch.ones(5, 12)}, plain / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="no lora_A/lora_B tensors, so it would change nothing"):
        load(plain)


def test_one_error_lists_what_is_wrong_with_config_and_tensors(plain: Path) -> None:
    edit(plain, use_qalora=True, shiny_option=1, use_dora=True)
    retensor(plain, {f"{B}{Q.format(0)}.lora_B.weight": None, "stray": torch.ones(1)})
    with pytest.raises(FormatError) as caught:
        load(plain)
    text = str(caught.value)
    for words in ("use_qalora", "shiny_option", "q_proj has lora_A but no lora_B", "tensor stray", "no dora"):
        assert words in text
    assert len(caught.value.problems) == 4 + 5


def test_nan_is_an_error_on_the_first_read_that_lists_every_factor(plain: Path) -> None:
    a, b = (torch.ones(4, 12), torch.ones(12, 4))
    a[1, 2], b[0, 0], b[0, 1] = float("nan"), float("inf"), float("-inf")
    retensor(plain, {f"{B}{Q.format(0)}.lora_A.weight": a, f"{B}{OUT.format(2)}.lora_B.weight": b})
    lora = load(plain)
    with pytest.raises(NonFiniteError) as caught:
        lora.check()
    file = plain / "adapter_model.safetensors"
    said = f"{file}: tensor {B}layers.0.q_proj.lora_A.weight: 1 of 48 values are NaN or Inf"
    assert [p.split(";")[0] for p in caught.value.problems] == [
        said,
        f"{file}: tensor {B}layers.2.o_proj.lora_B.weight: 2 of 48 values are NaN or Inf",
    ]
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q_proj\.lora_A\.weight: 1 of 48"):
        lora.adapters[f"{Q.format(0)}.weight"].apply(np.ones(12))
    assert np.isnan(load(plain, allow_nonfinite=True).adapters[f"{Q.format(0)}.weight"].apply(np.ones(12))).all()


# ---- the old pickles ------------------------------------------------------------------------------

BIN = "adapter_model.bin"


def as_bin(folder: Path, **others: Any) -> Path:
    """Put a pickle with these further entries in place of the saved file."""
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path) | {B + key: value for key, value in others.items()}, folder / BIN)
    path.unlink()
    return folder / BIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_old_pickle_is_the_same_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "emb"], modules_to_save=["head"])
    model = saved(Net().to(dtype), tmp_path / "new", config)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert not (tmp_path / "old" / "adapter_model.safetensors").exists()
    new, old = load(tmp_path / "new"), load(tmp_path / "old")
    check_updates(old, updates(model))
    for name, delta in new.adapters.items():
        np.testing.assert_array_equal(old.adapters[name].a, delta.a)
        assert old.adapters[name].b.dtype == delta.b.dtype
    assert set(old.extras["modules_to_save"]) == set(new.extras["modules_to_save"]) == {"head.weight", "head.bias"}


def test_an_old_pickle_without_torch_says_what_to_install(tmp_path: Path, plain: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text((plain / "adapter_config.json").read_text())
    torch.save(load_file(plain / "adapter_model.safetensors"), old / BIN)
    program = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from lorastack import load
print(load(sys.argv[1]).num_adapters())
load(sys.argv[2])
"""
    run = subprocess.run([sys.executable, "-c", program, plain, old], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "6", "safetensors need no torch"
    assert "MissingDependencyError: this needs torch" in run.stderr
    assert "pip install 'lorastack[torch]'" in run.stderr


class Malice:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("archive", [True, False], ids=["torch archive", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, plain: Path, archive: bool) -> None:
    mark = tmp_path / "it ran".replace(" ", "_")
    (plain / "adapter_model.safetensors").unlink()
    state = {B + "layers.0.q_proj.lora_A.weight": Malice(mark)}
    if archive:
        torch.save(state, plain / BIN)
        torch.load(plain / BIN, weights_only=False)
    else:
        (plain / BIN).write_bytes(pickle.dumps(state))
        pickle.loads((plain / BIN).read_bytes())
    assert mark.exists(), "the pickle is a working one"
    mark.unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.bin: torch\.load\(weights_only=True\) refuses it"):
        load(plain)
    with pytest.raises(FormatError, match="refuses it"):
        load(plain / BIN)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", bytes(1000)])
def test_a_damaged_pickle_is_refused(plain: Path, content: bytes) -> None:
    (plain / "adapter_model.safetensors").unlink()
    (plain / BIN).write_bytes(content)
    with pytest.raises(FormatError, match=r"adapter_model\.bin"):
        load(plain)


@pytest.mark.parametrize("state", [[torch.ones(2)], {"a": 1}, torch.ones(3)], ids=["list", "number", "tensor"])
def test_a_pickle_of_something_else_is_refused(plain: Path, state: Any) -> None:
    (plain / "adapter_model.safetensors").unlink()
    torch.save(state, plain / BIN)
    with pytest.raises(FormatError, match="it holds no state dict of tensors"):
        load(plain)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(3, device="meta"), "expected a dense float tensor"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (torch.ones(3, dtype=torch.int32), "int32"),
    ],
    ids=["sparse", "float8", "meta", "complex", "int"],
)
def test_a_pickled_tensor_that_is_no_plain_array_is_refused(plain: Path, tensor: torch.Tensor, said: str) -> None:
    as_bin(plain, odd=tensor)
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)
    assert B + "odd" in str(caught.value)


def test_a_pickle_that_repeats_its_storage_without_end_is_refused(plain: Path) -> None:
    size = as_bin(plain, bomb=torch.ones(1).expand(1 << 20, 1 << 28)).stat().st_size
    assert size < 20_000
    with pytest.raises(FormatError, match=f"tensors need {(1 << 50) + 2112} bytes, the file has {size}"):
        load(plain)


def test_an_archive_that_unpacks_to_many_times_its_size_is_refused(plain: Path) -> None:
    path = as_bin(plain, bomb=torch.zeros(1 << 21))
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(plain / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    os.replace(plain / "packed", path)
    assert path.stat().st_size < 100_000
    with pytest.raises(FormatError, match=r"its tensors need 8\d{6} bytes, the file has \d{5};"):
        load(plain)


# ---- files and names ------------------------------------------------------------------------------


def test_the_name_is_the_folders_whichever_way_it_is_given(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain)
    for path in (plain, f"{plain}/", ".", plain / "adapter_config.json", "adapter_model.safetensors", "../plain"):
        assert load(path).name == "plain"
    assert load(plain, name="other").name == "other"


def test_weights_without_their_config_are_refused(plain: Path) -> None:
    (plain / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"PEFT weights without their adapter_config\.json, which holds the scaling"):
        load(plain)


def test_a_config_without_its_weights_is_refused(plain: Path) -> None:
    (plain / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        load(plain)


def test_a_lfs_pointer_says_how_to_fetch_the_file(plain: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
    (plain / "adapter_model.gguf").write_bytes(pointer)
    with pytest.raises(FormatError, match=r"Git LFS pointer.*git lfs pull"):
        load(plain / "adapter_model.gguf")
