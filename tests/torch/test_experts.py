"""Experts kept as one parameter: against PEFT's target_parameters, and against llama.cpp."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

from lorastack import LoadedLora, LoraStack
from lorastack.errors import UnsupportedError
from lorastack.torch import attach, detach
from tests.models import logits, to_hf_rows
from tests.torch.tiny import GROUPED, far, tokens

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)).eval()


def qwen3_moe() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
                               decoder_sparse_step=1, mlp_only_layers=[])  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config).eval()


def saved(model: torch.nn.Module, folder: Path, parameters: list[str], seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(copy.deepcopy(model), config).save_pretrained(str(folder))
    return folder


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "parameters", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.experts.down_proj"]]
)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_target_parameters_give_pefts_logits(make, parameters, implementation, tmp_path) -> None:
    model = make()
    model.set_experts_implementation(implementation)
    base = run(model)
    folder = saved(model, tmp_path / "a", parameters, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())
    with attach(model, LoraStack([(LoadedLora.load(folder), 1.0)])) as handle:
        assert far(run(model), expected) < 1e-5
        handle.set_scale("a", 0.0)
        assert far(run(model), base) < 1e-6
    assert far(base, expected) > 1e-3
    assert torch.equal(run(model), base)


def test_experts_stack_as_the_sum_of_their_updates(tmp_path) -> None:
    model = mixtral()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    loras = [LoadedLora.load(saved(model, tmp_path / f"a{n}", parameters, n)) for n in (1, 2)]
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for scale, lora in zip((0.6, -0.3), loras, strict=True):
            for name, delta in lora.adapters.items():
                merged.get_parameter(name).add_(scale * torch.from_numpy(delta.dense()))
    with attach(model, LoraStack([(loras[0], 0.6), (loras[1], -0.3)])):
        assert far(run(model), run(merged)) < 1e-5


def gpt_oss() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tf.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8)
    return tf.GptOssForCausalLM(config).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_experts_by_row_are_each_row_alone(make, packed: bool, tmp_path: Path) -> None:
    model = make()
    up = "gate_up_proj"
    said = [[f"mlp.experts.{up}", "mlp.experts.down_proj"], ["mlp.experts.down_proj"], [f"mlp.experts.{up}"]]
    loras = [LoadedLora.load(saved(model, tmp_path / f"a{n}", one, n)) for n, one in enumerate(said)]
    mixtures = [{"a0": 1.0}, {"a1": 0.5, "a2": -1.5}, {}, {"a0": 0.3, "a1": 0.3, "a2": 0.3}, {"a2": 1.0}]
    ids = tokens(5, 1 if packed else 6)
    more = {}
    if packed:
        mask = torch.where(torch.eye(5) > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        more = {"attention_mask": mask, "position_ids": torch.zeros(1, 5, dtype=torch.long)}
    with attach(model, LoraStack([(lora, 0.8) for lora in loras])) as handle, torch.no_grad():
        stacked = run(model)
        with handle.rows(mixtures, **({"index": range(5)} if packed else {})):
            found = model(input_ids=ids.view(1, 5) if packed else ids, **more).logits
        found = found[0][:, None] if packed else found
        assert torch.equal(run(model), stacked)
    assert "forward" not in model.model.layers[0].mlp.experts.__dict__
    for n, mixture in enumerate(mixtures):
        stack = LoraStack([(lora, mixture[lora.name]) for lora in loras if lora.name in mixture])
        with attach(model, stack), torch.no_grad():
            assert far(found[n : n + 1], model(input_ids=ids[n : n + 1]).logits) < 1e-5, n


def test_experts_of_a_copy_are_detached_by_themselves(tmp_path: Path) -> None:
    model = mixtral()
    base = run(model)
    with attach(model, LoadedLora.load(saved(model, tmp_path / "a", ["mlp.experts.down_proj"], 1))) as handle:
        twin = copy.deepcopy(model)
        detach(twin)
        assert torch.equal(run(twin), base)
        with torch.no_grad(), handle.rows([{"a": 1.0}, {}]):
            rows = model(input_ids=tokens(2)).logits
        assert far(rows[0], base[0]) > 1e-3
        assert far(rows[1], base[1]) < 1e-6
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("fullgraph", [False])
def test_compiled_experts_by_row(fullgraph: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = mixtral()
    lora = LoadedLora.load(saved(model, tmp_path / "a", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], 1))
    live = torch.compile(model, backend="eager", fullgraph=fullgraph)
    run(live)
    with warnings.catch_warnings(), attach(live, lora) as handle, torch.no_grad():
        warnings.simplefilter("ignore")
        for mixtures in ([{"a": 1.0}, {}], [{}, {"a": -0.5}]):
            with handle.rows(mixtures):
                assert far(live(input_ids=tokens(2)).logits, model(input_ids=tokens(2)).logits) < 1e-5


def test_rows_refuse_experts_of_unknown_code_with_a_word() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.down_proj[0]

    model = torch.nn.ModuleDict({"experts": Experts()})
    lora = LoadedLora.from_tensors({"experts.down_proj": (np.ones((2, 1, 4)), np.ones((2, 4, 1)))}, name="a")
    with (
        attach(model, lora) as handle,
        pytest.raises(UnsupportedError, match="a: it changes down_proj of Experts, whose code is not known to keep"),
        handle.rows([{"a": 1.0}, {}]),
    ):
        pass


def reference_mixtral(path: Path) -> torch.nn.Module:
    """The Mixtral of a GGUF file, built by hand: transformers reads it as a plain llama with random experts."""
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    heads, kv_heads = said["llama.attention.head_count"], said["llama.attention.head_count_kv"]
    config = tf.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=said["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv_heads, num_local_experts=said["llama.expert_count"],
        num_experts_per_tok=said["llama.expert_used_count"], rope_theta=said["llama.rope.freq_base"],
        rms_norm_eps=said["llama.attention.layer_norm_rms_epsilon"], sliding_window=None,
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for n in range(config.num_hidden_layers):
        w = {
            k.removeprefix(f"blk.{n}.").removesuffix(".weight"): v
            for k, v in weights.items()
            if k.startswith(f"blk.{n}.")
        }
        state |= {f"model.layers.{n}.{key}": value for key, value in {
            "self_attn.q_proj.weight": to_hf_rows(w["attn_q"].T, heads).T,
            "self_attn.k_proj.weight": to_hf_rows(w["attn_k"].T, kv_heads).T,
            "self_attn.v_proj.weight": w["attn_v"],
            "self_attn.o_proj.weight": w["attn_output"],
            "input_layernorm.weight": w["attn_norm"],
            "post_attention_layernorm.weight": w["ffn_norm"],
            "mlp.gate.weight": w["ffn_gate_inp"],
            "mlp.experts.gate_up_proj": np.concatenate([w["ffn_gate_exps"], w["ffn_up_exps"]], 1),
            "mlp.experts.down_proj": w["ffn_down_exps"],
        }.items()}  # fmt: skip
    model = tf.MixtralForCausalLM(config).eval()
    model.load_state_dict({key: torch.tensor(np.ascontiguousarray(value)) for key, value in state.items()})
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gguf_experts_give_llama_cpps_logits(shared: Path, implementation: str) -> None:
    folder = shared / "gguf_cases"
    model = reference_mixtral(folder / "base_moe.gguf")
    model.set_experts_implementation(implementation)
    expected = np.load(folder / "logits_llama_cpp.npz")
    cases = [case for case in json.loads((folder / "logits_llama_cpp.json").read_text()) if "moe" in case["base"]]
    assert [case["stack"] for case in cases] == [[], [["lora_moe.gguf", 1.0]]]
    np.testing.assert_allclose(logits(model, cases[0]["tokens"]), expected[cases[0]["key"]], atol=1e-4, rtol=0)
    with attach(model, LoadedLora.load(folder / "lora_moe.gguf")) as handle:
        np.testing.assert_allclose(logits(model, cases[1]["tokens"]), expected[cases[1]["key"]], atol=1e-4, rtol=0)
        assert len(handle.report.matched["lora_moe"]) == 8
