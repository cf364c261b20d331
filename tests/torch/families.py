"""Tiny random models of families whose names differ between files, older saves and live models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

from lorastack import LoadedLora
from tests.torch.tiny import COMMON, GROUPED, SMALL, tokens

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 8, "patch_size": 4}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def llava() -> nn.Module:
    config = tf.LlavaConfig(
        text_config=tf.Qwen2Config(**GROUPED), vision_config=tf.CLIPVisionConfig(**_VISION), image_token_id=63
    )
    return tf.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**GROUPED, head_dim=8).to_dict(),
        vision_config=tf.SiglipVisionConfig(**_VISION).to_dict(),
        projection_dim=32,
        image_token_index=63,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 1, "temporal_patch_size": 1}  # fmt: skip
    text = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **COMMON)
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen3_moe() -> nn.Module:
    return tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**GROUPED, **_MOE, head_dim=8, decoder_sparse_step=1, mlp_only_layers=[])
    )


def qwen2_moe() -> nn.Module:
    return tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**GROUPED, **_MOE, shared_expert_intermediate_size=24, decoder_sparse_step=1)
    )


def olmoe() -> nn.Module:
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2))


def phimoe() -> nn.Module:
    return tf.PhimoeForCausalLM(tf.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2))


def qwen2(**more: Any) -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, **more))


def opt() -> nn.Module:
    config = tf.OPTConfig(**COMMON, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                          word_embed_proj_dim=32, max_position_embeddings=32, tie_word_embeddings=False)  # fmt: skip
    return tf.OPTForCausalLM(config)


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bert() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**SMALL))


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**{**_VISION, "num_channels": 3}))


def whisper() -> nn.Module:
    config = tf.WhisperConfig(**COMMON, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                              decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                              max_source_positions=20, max_target_positions=20, decoder_start_token_id=1)  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        llava,
        paligemma,
        qwen2_vl,
        qwen3_moe,
        qwen2_moe,
        olmoe,
        phimoe,
        qwen2,
        opt,
        gpt2,
        t5,
        bert,
        vit,
        whisper,
        mamba,
    )
}


def made(name: str) -> nn.Module:
    """The model of that family, always the same one."""
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


def folder_of(model: Any, path: Path) -> Path:
    """The model as transformers saves it: under the names that files have."""
    model.save_pretrained(path)
    return path


def logits(model: nn.Module) -> torch.Tensor:
    """What a language model answers to the tokens of all tests."""
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def adapter_for(weights: dict[str, tuple[int, int]], rank: int = 3, seed: int = 0) -> LoadedLora:
    """An adapter of random factors: weight name -> (out, in)."""
    rng = np.random.default_rng(seed)
    factors = {
        name: (
            rng.standard_normal((rank, n_in), np.float32),
            0.3 * rng.standard_normal((n_out, rank)).astype(np.float32),
        )
        for name, (n_out, n_in) in weights.items()
    }
    return LoadedLora.from_tensors(factors, alpha=2 * rank, name="made", naming="hf")


def linear_weights(model: nn.Module, ending: str) -> dict[str, tuple[int, int]]:
    """Names and shapes of the linear layers whose path ends so."""
    return {
        f"{path}.weight": (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(ending)
    }
