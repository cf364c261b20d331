"""Names and row orders between Hugging Face and GGUF, against llama.cpp's own conversions and FORMATS.md's formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from lorastack import LoadedLora, convert_names, load
from lorastack.base import BaseModel, open_base
from lorastack.base.architectures import BY_GGUF, BY_HF, REFUSED
from lorastack.errors import FormatError, NamingError, UnsupportedError
from lorastack.inspect import inspect

#: Hugging Face class -> (architecture in GGUF, `model_type`); test_architectures.py has every one that is listed.
KNOWN = {
    "LlamaForCausalLM": ("llama", "llama"),
    "MistralForCausalLM": ("llama", "mistral"),
    "MixtralForCausalLM": ("llama", "mixtral"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen2MoeForCausalLM": ("qwen2moe", "qwen2_moe"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": ("qwen3moe", "qwen3_moe"),
    "GemmaForCausalLM": ("gemma", "gemma"),
    "Gemma2ForCausalLM": ("gemma2", "gemma2"),
    "Gemma3ForCausalLM": ("gemma3", "gemma3_text"),
    "PhiForCausalLM": ("phi2", "phi"),
    "Phi3ForCausalLM": ("phi3", "phi3"),
    "GPT2LMHeadModel": ("gpt2", "gpt2"),
    "BloomForCausalLM": ("bloom", "bloom"),
    "GPTNeoXForCausalLM": ("gptneox", "gpt_neox"),
}
Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


def hf_base(cls: str, shapes: dict[str, tuple[int, ...]], **config: int) -> BaseModel:
    return BaseModel("my-model", "hf", cls, {"num_hidden_layers": 3} | config, shapes)


def gguf_base(arch: str, shapes: dict[str, tuple[int, ...]], **config: int) -> BaseModel:
    said = {f"{arch}.{key}": value for key, value in ({"block_count": 3} | config).items()}
    return BaseModel("my-model.gguf", "gguf", arch, said, shapes)


def numbered_rows(weight: str, rows: int) -> LoadedLora:
    """An adapter whose lora_B has the row's own number in each row, so that a move can be read off."""
    b = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 2, 1)
    return LoadedLora.from_tensors({weight: (np.ones((2, 5), np.float32), b)}, alpha=6, name="numbered")


def order_of(lora: LoadedLora) -> list[int]:
    (delta,) = lora.adapters.values()
    assert (delta.b[:, 0] == delta.b[:, 1]).all(), "columns of lora_B were mixed"
    return delta.b[:, 0].astype(int).tolist()


def same(one: LoadedLora, other: LoadedLora, dtype: type | None = None) -> None:
    assert sorted(one.adapters) == sorted(other.adapters)
    for name, delta in one.adapters.items():
        wanted = other.adapters[name]
        for half in ("a", "b"):
            expected = getattr(wanted, half).astype(dtype or getattr(wanted, half).dtype)
            found = getattr(delta, half)
            assert found.dtype == expected.dtype, f"{name}.{half} is {found.dtype}"
            np.testing.assert_array_equal(found, expected, err_msg=f"{name}.{half}")
        assert (delta.scaling, delta.kind) == (wanted.scaling, wanted.kind), name


# ---- llama.cpp's own conversions of real adapters


@pytest.mark.parametrize("name", ["excited", "zara"])
@pytest.mark.parametrize(("stored", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_from_gguf_the_peft_original_comes_back_to_the_bit(shared: Path, name: str, stored: str, dtype: type) -> None:
    folder = shared / "stories260k"
    converted = convert_names(load(folder / "gguf" / f"{name}.{stored}.gguf"), str(folder / "base"))
    assert converted.naming == "hf"
    same(converted, load(folder / "adapters" / name), dtype)


@pytest.mark.parametrize("name", ["excited", "zara"])
@pytest.mark.parametrize("base", ["base", "base.gguf"])
def test_from_peft_llama_cpps_conversion_comes_out_to_the_bit(shared: Path, name: str, base: str) -> None:
    folder = shared / "stories260k"
    converted = convert_names(load(folder / "adapters" / name), str(folder / base))
    assert converted.naming == "gguf"
    assert converted.metadata["general.architecture"] == "llama"
    same(converted, load(folder / "gguf" / f"{name}.f32.gguf"))


def test_the_rows_of_q_and_k_did_move_and_those_of_v_did_not(shared: Path) -> None:
    folder = shared / "stories260k"
    original = load(folder / "adapters/zara")
    converted = load(folder / "gguf/zara.f32.gguf")
    for part, moved in (("q", True), ("k", True), ("v", False)):
        here, there = (
            original.get(f"model.layers.0.self_attn.{part}_proj.weight"),
            converted.get(f"blk.0.attn_{part}.weight"),
        )
        assert here is not None
        assert there is not None
        assert (not np.array_equal(here.b, there.b)) == moved, part
        np.testing.assert_array_equal(here.a, there.a)


# ---- row orders, by the formulas of FORMATS.md


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize(("weight", "stem", "heads"), [(Q, "attn_q", 6), (K, "attn_k", 2)])
def test_rotary_rows_are_interleaved_by_pair(cls: str, weight: str, stem: str, heads: int) -> None:
    width = 8
    base = hf_base(cls, {weight: (heads * width, 5)}, num_attention_heads=6, num_key_value_heads=2)
    there = convert_names(numbered_rows(weight, heads * width), base)
    # HF [heads, 2, d/2] <-> GGUF [heads, d/2, 2]: row 2*pair + half of a head was row half*d/2 + pair.
    expected = [h * width + half * (width // 2) + pair for h in range(heads) for pair in range(4) for half in range(2)]
    assert list(there.adapters) == [f"blk.0.{stem}.weight"]
    assert order_of(there) == expected
    assert order_of(convert_names(there, base)) == list(range(heads * width))


def test_a_base_without_key_value_heads_has_as_many_as_heads() -> None:
    base = hf_base("LlamaForCausalLM", {K: (16, 5)}, num_attention_heads=4)
    assert order_of(convert_names(numbered_rows(K, 16), base))[:4] == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("cls", "weight"),
    [
        ("BloomForCausalLM", "transformer.h.1.self_attention.query_key_value.weight"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.1.attention.query_key_value.weight"),
    ],
)
def test_fused_rows_are_ordered_by_part_instead_of_by_head(cls: str, weight: str) -> None:
    heads, width = 4, 3
    config = {"n_head": heads, "n_layer": 3} if cls == "BloomForCausalLM" else {"num_attention_heads": heads}
    base = hf_base(cls, {weight: (heads * 3 * width, 5)}, **config)
    there = convert_names(numbered_rows(weight, heads * 3 * width), base)
    # HF [head, 3, d] <-> GGUF [3, head, d]
    expected = [(h * 3 + part) * width + i for part in range(3) for h in range(heads) for i in range(width)]
    assert list(there.adapters) == ["blk.1.attn_qkv.weight"]
    assert order_of(there) == expected
    assert order_of(convert_names(there, base)) == list(range(heads * 3 * width))


@pytest.mark.parametrize("cls", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("weight", [Q, K])
def test_qwen_and_gemma_keep_their_rows(cls: str, weight: str) -> None:
    base = hf_base(cls, {weight: (24, 5)}, num_attention_heads=3, num_key_value_heads=3)
    assert order_of(convert_names(numbered_rows(weight, 24), base)) == list(range(24))


def test_only_lora_b_moves_and_the_scaling_stays() -> None:
    base = hf_base("LlamaForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    a = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    lora = LoadedLora.from_tensors({Q: (a, np.ones((16, 2), np.float32))}, alpha=6)
    (delta,) = convert_names(lora, base).adapters.values()
    np.testing.assert_array_equal(delta.a, a)
    assert delta.scaling == 3.0


# ---- names, by gguf's map and real models' own keys


def tiny_model(cls: str, model_type: str) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 2, "num_experts": 2, "head_dim": 8,
             "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "pad_token_id": 0}  # fmt: skip
    if model_type in ("gpt2", "bloom", "gpt_neox"):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == cls
    return model


@pytest.mark.parametrize("cls", KNOWN)
def test_every_linear_layer_of_a_known_model_goes_there_and_back(cls: str) -> None:
    arch, model_type = KNOWN[cls]
    model = tiny_model(cls, model_type)
    linear = [f"{path}.weight" for path, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    if cls in ("GemmaForCausalLM", "Gemma2ForCausalLM"):
        linear.remove("lm_head.weight")  # always the embedding itself: there is no such tensor in these GGUF files
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    conv1d = {f"{path}.weight" for path, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    base = BaseModel("tiny", "hf", cls, model.config.to_dict(), shapes)
    tensors = {}
    for name in linear:
        out, n_in = reversed(shapes[name]) if name in conv1d else shapes[name]
        tensors[name] = (np.zeros((1, n_in), np.float32), np.zeros((out, 1), np.float32))
    there = convert_names(LoadedLora.from_tensors(tensors), base)
    # llama.cpp's names for the tensors of that architecture, in the table of its own package.
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    allowed = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[number]}
    stray = [n for n in there.adapters if n.removesuffix(".weight").replace("blk.1.", "blk.{bid}.").replace(
        "blk.0.", "blk.{bid}.") not in allowed]  # fmt: skip
    assert stray == []
    assert len(there.adapters) == len(linear) > 3
    assert list(convert_names(there, base).adapters) == linear


def test_files_that_leave_out_the_models_prefix_still_give_the_names_that_peft_uses(tmp_path: Path) -> None:
    # openai-community/gpt2 on the hub has "h.0.attn.c_attn.weight"; PEFT targets "transformer.h.0.attn.c_attn".
    weights = {"h.0.attn.c_attn.weight": np.zeros((5, 15), np.float32), "wte.weight": np.zeros((9, 5), np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 1}))
    base = open_base(tmp_path)
    there = convert_names(numbered_rows("blk.0.attn_qkv.weight", 15), base)
    assert list(there.adapters) == ["transformer.h.0.attn.c_attn.weight"]
    assert (there.metadata["fan_in_fan_out"], there.metadata["base_model_name_or_path"]) == (True, str(tmp_path))
    assert list(convert_names(there, base).adapters) == ["blk.0.attn_qkv.weight"]
    assert inspect(there, base).misfits == []


def test_embedding_and_head_have_names_too() -> None:
    shapes = {"model.embed_tokens.weight": (20, 6), "lm_head.weight": (20, 6), Q: (16, 6)}
    base = hf_base("LlamaForCausalLM", shapes, num_attention_heads=2)
    ab = (np.ones((2, 20), np.float32), np.ones((6, 2), np.float32))
    lora = LoadedLora.from_tensors({"token_embd.weight": ab})
    (delta,) = (here := convert_names(lora, base)).adapters.values()
    assert (list(here.adapters), delta.kind) == (["model.embed_tokens.weight"], "embedding")
    head = LoadedLora.from_tensors({"output.weight": (ab[1].T.copy(), ab[0].T.copy())})
    assert list(convert_names(head, base).adapters) == ["lm_head.weight"]


# ---- what is refused


@pytest.mark.parametrize("cls", sorted(set(CAUSAL.values()) - set(BY_HF) - set(REFUSED)))
def test_every_architecture_that_is_not_listed_is_refused_by_name(cls: str) -> None:
    base = hf_base(cls, {Q: (16, 5)}, num_attention_heads=2)
    with pytest.raises(UnsupportedError, match=f"architecture '{cls}': its row order .* is not known"):
        convert_names(numbered_rows(Q, 16), base)


@pytest.mark.parametrize("arch", sorted(set(gguf.MODEL_ARCH_NAMES.values()) - set(BY_GGUF) - set(REFUSED)))
def test_every_gguf_architecture_that_is_not_listed_is_refused_by_name(arch: str) -> None:
    base = gguf_base(arch, {"blk.0.attn_q.weight": (16, 5)}, **{"attention.head_count": 2})
    with pytest.raises(UnsupportedError, match=f"architecture '{arch}': its row order .* is not known"):
        convert_names(numbered_rows(Q, 16), base)


def test_the_refusal_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as caught:
        convert_names(numbered_rows(Q, 16), hf_base("OPTForCausalLM", {Q: (16, 5)}))
    assert [name for name in KNOWN if name not in str(caught.value)] == []


def test_all_unknown_weights_are_listed() -> None:
    rng = np.random.default_rng(0)
    ab = rng.standard_normal((2, 5)).astype(np.float32), rng.standard_normal((16, 2)).astype(np.float32)
    base = hf_base("LlamaForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    lora = LoadedLora.from_tensors({Q: ab, "model.layers.0.mixer.weight": ab, "other.thing.weight": ab}, name="odd")
    with pytest.raises(NamingError, match="odd does not fit base my-model: 2 problems") as caught:
        convert_names(lora, base)
    assert "weight model.layers.0.mixer.weight has no GGUF name in architecture llama" in str(caught.value)
    assert "weight other.thing.weight has no GGUF name" in str(caught.value)
    back = LoadedLora.from_tensors({f"blk.{n}.attn_q.weight": ab for n in (0, 1, 2)}, name="deep")
    with pytest.raises(NamingError) as caught:
        convert_names(back, base)
    assert [line.split()[1] for line in caught.value.problems] == ["blk.1.attn_q.weight", "blk.2.attn_q.weight"]


def test_weights_that_a_gguf_base_lacks_are_listed() -> None:
    base = gguf_base("llama", {"blk.0.attn_q.weight": (16, 5)}, **{"attention.head_count": 2})
    ab = np.ones((2, 5), np.float32), np.ones((16, 2), np.float32)
    with pytest.raises(NamingError) as caught:
        convert_names(LoadedLora.from_tensors({Q: ab, K: ab, V: ab}), base)
    assert list(caught.value.problems) == [
        f"weight {K} is blk.0.attn_k.weight, which the base lacks",
        f"weight {V} is blk.0.attn_v.weight, which the base lacks",
    ]


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_shapes_that_the_base_does_not_have_are_all_listed(to: str) -> None:
    base = hf_base("LlamaForCausalLM", {Q: (16, 5), K: (16, 5), V: (16, 5)}, num_attention_heads=2)
    names = [Q, K, V] if to == "gguf" else [f"blk.0.attn_{part}.weight" for part in "qkv"]
    rows, columns = (16, 18, 16), (5, 5, 6)
    lora = LoadedLora.from_tensors(
        {
            n: (np.ones((2, c), np.float32), np.ones((r, 2), np.float32))
            for n, r, c in zip(names, rows, columns, strict=True)
        }
    )
    with pytest.raises(NamingError, match="2 problems") as caught:
        convert_names(lora, base)
    assert f"weight {K} is [16, 5] in the base, this adapter changes [18, 5]" in str(caught.value)
    assert f"weight {V} is [16, 5] in the base, this adapter changes [16, 6]" in str(caught.value)


def test_another_architecture_is_refused_with_both_names() -> None:
    base = hf_base("Qwen2ForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    lora = replace(numbered_rows("blk.0.attn_q.weight", 16), metadata={"general.architecture": "llama"})
    with pytest.raises(NamingError, match="numbered is for architecture 'llama', base my-model is 'qwen2'"):
        convert_names(lora, base)


def test_towards_hugging_face_a_gguf_base_is_not_enough_and_the_way_out_is_said(shared: Path) -> None:
    folder = shared / "stories260k"
    lora = load(folder / "gguf/excited.f32.gguf")
    with pytest.raises(NamingError, match="give the folder or hub id it was converted from"):
        convert_names(lora, str(folder / "base.gguf"))


def test_names_of_ones_own_cannot_be_converted() -> None:
    base = hf_base("LlamaForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    with pytest.raises(NamingError, match="numbered has names of its own"):
        convert_names(numbered_rows("weight", 16), base)


def test_names_of_the_kind_asked_for_stay_as_they_are() -> None:
    lora = numbered_rows(Q, 16)
    assert convert_names(lora, hf_base("LlamaForCausalLM", {Q: (16, 5)}), to="hf") is lora


def test_a_base_without_head_count_is_refused() -> None:
    with pytest.raises(FormatError, match="base my-model: its configuration names no num_attention_heads or n_head"):
        convert_names(numbered_rows(Q, 16), hf_base("LlamaForCausalLM", {Q: (16, 5)})).adapters["blk.0.attn_q.weight"]


# ---- what goes with a weight


def peft_folder(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_dora_magnitudes_and_biases_of_lora_b_move_with_their_rows(tmp_path: Path) -> None:
    module = Q.removesuffix(".weight")
    rows = np.arange(16, dtype=np.float32)
    tensors = {
        f"{module}.lora_A.weight": np.ones((2, 5), np.float32),
        f"{module}.lora_B.weight": np.repeat(rows[:, None], 2, 1),
        f"{module}.lora_B.bias": rows * 10,
        f"{module}.lora_magnitude_vector": rows * 100,
    }
    lora = load(peft_folder(tmp_path / "both", tensors, use_dora=True, lora_bias=True))
    base = hf_base("LlamaForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    there = convert_names(lora, base)
    order = order_of(there)
    assert order == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert there.extras["lora_bias"]["blk.0.attn_q.weight"].array.tolist() == [10 * n for n in order]
    assert there.extras["dora"]["blk.0.attn_q.weight"].array.tolist() == [100 * n for n in order]
    back = convert_names(there, base)
    assert back.extras["lora_bias"][Q].array.tolist() == (rows * 10).tolist()
    assert back.extras["dora"][Q].array.tolist() == (rows * 100).tolist()


def test_extras_that_cannot_be_converted_are_all_listed(tmp_path: Path) -> None:
    module = Q.removesuffix(".weight")
    tensors = {
        f"{module}.lora_A.weight": np.ones((2, 5), np.float32),
        f"{module}.lora_B.weight": np.ones((16, 2), np.float32),
        "model.norm.weight": np.ones(5, np.float32),
        "lm_head.weight": np.ones((20, 5), np.float32),
    }
    lora = load(peft_folder(tmp_path / "saved", tensors, modules_to_save=["norm", "lm_head"]))
    base = hf_base("LlamaForCausalLM", {Q: (16, 5)}, num_attention_heads=2)
    with pytest.raises(UnsupportedError, match=r"cannot be converted; leave it out with without_extras\(\)") as caught:
        convert_names(lora, base)
    assert sorted(caught.value.problems) == ["modules_to_save: lm_head.weight", "modules_to_save: model.norm.weight"]
    assert list(convert_names(lora.without_extras(), base).adapters) == ["blk.0.attn_q.weight"]


# ---- there and back

ARCHITECTURES = {
    "LlamaForCausalLM": [
        "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"],
    "Qwen2ForCausalLM": ["model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.gate_proj.weight"],
    "BloomForCausalLM": [
        "transformer.h.{}.self_attention.query_key_value.weight", "transformer.h.{}.mlp.dense_4h_to_h.weight"],
    "GPTNeoXForCausalLM": [
        "gpt_neox.layers.{}.attention.query_key_value.weight", "gpt_neox.layers.{}.attention.dense.weight"],
    "GPT2LMHeadModel": ["transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.mlp.c_proj.weight"],
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_there_and_back_is_the_identity(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cls = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    kv, groups, half, layers = (data.draw(st.integers(1, 4)) for _ in range(4))
    heads, n_in = kv * groups, data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    tensors, shapes = {}, {}
    for layer in range(layers):
        for pattern in ARCHITECTURES[cls]:
            name = pattern.format(layer)
            rows = (kv if "k_proj" in name else heads) * 2 * half * (3 if "query_key_value" in name else 1)
            shapes[name] = (n_in, rows) if cls == "GPT2LMHeadModel" else (rows, n_in)
            if data.draw(st.booleans()):
                rank = data.draw(st.integers(1, 5))
                shape_a, shape_b = (rank, n_in), (rows, rank)
                tensors[name] = rng.standard_normal(shape_a).astype(dtype), rng.standard_normal(shape_b).astype(dtype)
    lora = LoadedLora.from_tensors(tensors, alpha=data.draw(st.floats(0.5, 32)), naming="hf")
    base = hf_base(cls, shapes, num_attention_heads=heads, num_key_value_heads=kv, num_hidden_layers=layers)
    there = convert_names(lora, base)
    assert there.naming == "gguf"
    assert len(there.adapters) == len(lora.adapters)
    same(convert_names(there, base), lora)


def test_the_demos_base_says_the_same_as_folder_and_as_gguf(demo: Path) -> None:
    folder, file = open_base(demo / "base"), open_base(demo / "base.gguf")
    assert (folder.layers, folder.heads, folder.kv_heads) == (file.layers, file.heads, file.kv_heads) == (4, 4, 2)
    luna = load(demo / "luna")
    by_folder, by_file = convert_names(luna, folder), convert_names(luna, file)
    same(by_folder, by_file)
    assert len(by_file.adapters) == 28
