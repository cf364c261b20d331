"""Image models as tests have them: full-size ones on the meta device, small ones with numbers, and their bases."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorastack.base.model import BaseModel

SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SD35 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "sample_size": 128,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
WAN = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
WAN_I2V = {**WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

#: Kind of model -> its parts, as a pipeline calls them.
PARTS: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "sd15": {"unet": (UNet2DConditionModel, SD15), "text_encoder": (CLIPTextModel, CLIP_L)},
    "sdxl": {
        "unet": (UNet2DConditionModel, SDXL),
        "text_encoder": (CLIPTextModel, CLIP_L),
        "text_encoder_2": (CLIPTextModelWithProjection, {**CLIP_G, "projection_dim": 1280}),
    },
    "flux": {
        "transformer": (FluxTransformer2DModel, {"guidance_embeds": True}),
        "text_encoder": (CLIPTextModel, CLIP_L),
    },
    "sd3": {"transformer": (SD3Transformer2DModel, SD35)},
    "wan": {"transformer": (WanTransformer3DModel, WAN)},
    "wan-i2v": {"transformer": (WanTransformer3DModel, WAN_I2V)},
}


def built(kind: type, config: dict[str, Any]) -> torch.nn.Module:
    return kind(CLIPTextConfig(**config)) if kind.__module__.startswith("transformers") else kind(**config)


@functools.cache
def full_size(kind: str) -> dict[str, torch.nn.Module]:
    """The parts of a full-size model, without numbers."""
    with torch.device("meta"):
        return {name: built(*part) for name, part in PARTS[kind].items()}


def base_of(parts: dict[str, torch.nn.Module], name: str = "pipe") -> BaseModel:
    """A pipeline as a base; a part called "" is a model by itself."""
    shapes = {
        f"{part}.{key}" if part else key: tuple(value.shape)
        for part, model in parts.items()
        for key, value in model.state_dict().items()
    }
    return BaseModel(name, "hf", None, {}, shapes)


def modules_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear layer and convolution."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d))
    }
