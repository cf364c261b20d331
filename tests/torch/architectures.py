"""Tiny random models of transformers' own classes, shrunk by the names of their configurations' fields."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

VOCABULARY = 128
#: A whole-number field -> its size here; the first pattern that matches counts.
_SIZES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(rf"(?:{pattern})$"), size)
    for pattern, size in [
        (r"(?:.*_)?vocab_size(?:_per_layer_input)?", VOCABULARY),
        (r"hidden_size_per_layer_input", 8),
        (
            r"n_ctx|n_positions|(?:original_)?max_\w*position\w*|max_(?:source|target)_positions|max_seq\w*|seq_length",
            64,
        ),
        (r"(?:moe_|expert_|shared_expert_|moe_shared_expert_|shared_)intermediate_size|\w*expert_ffn_hidden_size", 24),
        (r"routed_expert_hidden_size|moe_ffn_hidden_size", 24),
        (r"(?:.*_)?(?:intermediate_size(?:_mlp)?|intermediate_dim|ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner)", 64),
        (r"(?:.*_)?(?:inner_dim|dim_ff|filter_size|mlp_dim|feed_forward_size)", 64),
        (r"(?:.*_)?(?:num_(?:hidden_|encoder_|decoder_)?layers|n_layers?|encoder_layers|decoder_layers|num_blocks)", 2),
        (r"depth", 2),
        (r"(?:.*_)?(?:num_key_value_heads|n_kv_heads|num_kv_heads|kv_n_heads|multi_query_group_num)", 2),
        (r"(?:.*_)?(?:num_(?:\w+_)?attention_heads|attention_heads|n_heads?|num_heads)", 4),
        (r"qk_head_dim|kv_lora_rank|q_lora_rank|o_lora_rank", 16),
        (r"(?:.*_)?head_dim|rotary_dim|d_kv|attention_head_size|d_head|kv_channels", 8),
        (r"index_n_heads", 2),
        (r"index_topk", 4),
        (r"(?:.*_)?(?:num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
        (r"num_experts_per_tok(?:en)?|num_selected_experts|moe_k|moe_topk|top_k_experts|moe_top_k", 2),
        (r"\w*shared_experts?|n_group|topk_group|num_expert_groups|first_k_dense_replace|num_dense_layers?", 1),
        (r"(?:.*_)?hidden_size|(?:.*_)?embed_dim|(?:.*_)?projection_dim|d_model|n_embd|dim|embedding_size", 32),
        (r"hidden_dim|word_embed_proj_dim|d_embed|model_dim|emb_dim|lru_width|output_dim", 32),
        (r"linear_num_value_heads", 4),
        (r"linear_num_key_heads|linear_attn_num_heads", 2),
        (r"linear_conv_kernel_dim", 3),
        (r"mamba_n(?:um)?_heads|mamba_d_head|mamba_d_state|ssm_state_size|state_size|mamba_d_ssm|\w*chunk_size", 8),
        (r"mamba_n_groups|n_groups", 1),
        (r"mamba_dt_rank|time_step_rank", 4),
        (r"sliding_window(?:_size)?|attention_window_size|window_size|local_attention", 16),
        (r"image_size|crop_size", 32),
        (r"patch_size", 8),
        (r"pad_token_id", 0),
        (r"bos_token_id|decoder_start_token_id", 1),
        (r"eos_token_id|sep_token_id", 2),
    ]
]
_LATENT = {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
#: Model type -> what the sizes above do not say.
_SPECIAL: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": None},
    "codegen": {"rotary_dim": 4, "n_head": 4},
    "gptj": {"rotary_dim": 4},
    "ctrl": {"dff": 64},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "albert": {"embedding_size": 16},
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "deberta": {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": "c2p|p2c"},
    "deberta-v2": {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": ["c2p", "p2c"]},
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "max_length": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
    },
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2": {"full_attn_idxs": [1], "block_ff_dim": 64, "block_multiple_of": 8, "conv_L_cache": 3},
    "minimax": {"block_size": 4},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"num_dense_layers": 1, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "num_attention_heads": 4, "zero_expert_num": 2, "n_routed_experts": 4},
    **dict.fromkeys("deepseek_v3 deepseek_v32 minicpm3 youtu glm4_moe_lite".split(), _LATENT),
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "topk_method": "greedy", "n_routed_experts": 4,
                    "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}  # fmt: skip
#: What PEFT itself cannot wrap: routers that return tuples, Mamba's own output layer.
_EXCLUDED: dict[str, list[str]] = {
    **{name: ["router", "gate"] for name in ("llama4_text", "phimoe")},
    **{name: ["out_proj"] for name in ("mamba", "mamba2", "falcon_mamba", "nemotron_h", "falcon_h1")},
}
_FAMILIES = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
#: Those of every run: what people use, and one of each way in which models compute.
USUAL = {
    "causal": "apertus arcee bloom codegen cohere cohere2 ctrl dbrx deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe "
    "exaone4 falcon gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite "
    "granitemoe helium hunyuan_v1_moe jamba jetmoe lfm2 lfm2_moe llama llama4_text longcat_flash mamba minimax "
    "ministral mistral mixtral nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 stablelm starcoder2 xglm",
    "seq2seq": "bart fsmt led mt5 pegasus t5",
    "masked": "albert bert deberta deberta-v2 electra longformer roberta",
    "image": "beit vit",
}


class Architecture(NamedTuple):
    """One class of transformers and the model type it is for."""

    family: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.family}-{self.model_type}"


def architectures(usual: bool) -> Iterator[Architecture]:
    """The usual ones, or all the others."""
    for family, names in _FAMILIES.items():
        for model_type, cls in names.items():
            if (model_type in USUAL[family].split()) == usual:
                yield Architecture(family, model_type, cls if isinstance(cls, str) else cls[0])


def made(one: Architecture) -> nn.Module:
    """A random model of that class, small; ValueError when its configuration cannot be shrunk so far."""
    cls = getattr(tf, one.class_name)
    config = _shrunk(getattr(cls, "config_class", None) or CONFIG_MAPPING[one.model_type], one.model_type)
    if one.family in ("causal", "masked") and hasattr(config, "is_decoder"):
        config.is_decoder = one.family == "causal"
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(weight.numel() for weight in cls(copy.deepcopy(config)).parameters())
    if size > 3e7:
        raise ValueError(f"{one} has {size} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    _fill(model)
    return model


def inputs_of(family: str, model: Any) -> dict[str, Any]:
    """What a model of that family is called with, two rows."""
    ids = torch.randint(6, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    if family == "image":
        vision = model.config
        size = getattr(vision, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), size, size)}
    inputs: dict[str, Any] = {"input_ids": ids}
    if family == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :4]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def targets_of(one: Architecture, model: nn.Module) -> dict[str, Any]:
    """What PEFT is to train: every linear layer, and the experts that are kept in one parameter."""
    experts = set()
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and "expert" in f"{path}{type(module).__name__}".lower():
                layer = max((n for n, part in enumerate(path.split(".")) if part.isdigit()), default=-1)
                experts.add(".".join([*path.split(".")[layer + 1 :], name]))
    said: dict[str, Any] = {"target_modules": "all-linear"}
    if excluded := _EXCLUDED.get(one.model_type):
        said["exclude_modules"] = excluded
    return said | ({"target_parameters": sorted(experts)} if experts else {})


def _shrunk(cls: Any, model_type: str, inside: int = 0) -> Any:
    """A configuration with every size that it has made small, in its parts too."""
    default = cls()
    said = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    small: dict[str, Any] = {}
    for key, value in said.items():
        if key in (getattr(cls, "sub_configs", None) or {}) and value is not None and inside < 3:
            if type(value).__name__ != "PreTrainedConfig":
                small[key] = _shrunk(type(value), type(value).model_type, inside + 1).to_dict()
        elif type(value) is int or (value is None and key == "head_dim"):
            size = next((size for pattern, size in _SIZES if pattern.match(key)), None)
            small |= {} if size is None else {key: size}
    for alias in getattr(cls, "attribute_map", None) or {}:
        small.pop(alias, None)
    small |= {key: None for key in ("layer_types",) if isinstance(said.get(key), list)}
    small |= {"eos_token_id": 2} if isinstance(said.get("eos_token_id"), list) else {}
    small |= _SPECIAL.get(model_type, {})
    small = {key: value for key, value in small.items() if value is not None or key == "layer_types"}
    try:
        return cls(**small)
    except Exception:
        if "layer_types" not in small:
            raise
        layers = small.get("num_hidden_layers", 2)
        kinds = list(dict.fromkeys(said["layer_types"]))
        return cls(**{**small, "layer_types": (kinds * layers)[:layers]})


def _fill(model: nn.Module) -> None:
    """Numbers at which every layer matters, also where a class leaves memory as it is."""
    generator = torch.Generator().manual_seed(7)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in done or not weight.is_floating_point():
                    continue
                done.add(id(weight))
                spread = None
                if isinstance(module, (nn.Linear, Conv1D)) and name == "weight":
                    spread = 0.9 / weight.shape[0 if isinstance(module, Conv1D) else 1] ** 0.5
                elif isinstance(module, nn.Embedding):
                    spread = 0.5
                elif weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    spread = 0.9 / max(weight.shape[1:]) ** 0.5
                elif not torch.isfinite(weight).all() or (name == "bias" and isinstance(module, (nn.Linear, Conv1D))):
                    spread = 0.1
                if spread is not None:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
