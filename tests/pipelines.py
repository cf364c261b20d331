"""Small randomly initialised diffusers pipelines, and adapters for them."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from lorastack import LoadedLora


def words(length: int = 77) -> CLIPTokenizer:
    """A tokenizer that knows letters."""
    vocabulary = {"<|startoftext|>": 0, "<pad>": 1, "<|endoftext|>": 2}
    for letter in string.ascii_lowercase:
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def text_encoder(width: int = 32, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        vocab_size=100,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=width,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(cross: int = 32, **more: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": cross,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | more).eval()


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=2,
    ).eval()


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=words(),
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    model = unet(
        64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer=words(),
        tokenizer_2=words(),
        unet=model,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )
    return _quiet(pipe)


def flux(seed: int = 0) -> FluxPipeline:
    torch.manual_seed(seed)
    t5 = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipe = FluxPipeline(
        vae=vae(4),
        text_encoder=text_encoder(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer=words(),
        tokenizer_2=words(32),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}


def picture(pipe: Any, seed: int = 3, **more: Any) -> np.ndarray:
    """The latents of two prompts after a few steps."""
    given: dict[str, Any] = {
        "prompt": ["a cat", "two dogs"],
        "num_inference_steps": 3,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    if "Flux" in type(pipe).__name__:
        given["max_sequence_length"] = 16
    with torch.no_grad():
        return pipe(**given | more).images.float().numpy()


#: Which layers adapters are commonly trained on, by the end of their path.
TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out", ".ff.net.2", ".conv1", ".q_proj", ".fc1")


def weights_of(pipe: Any, parts: tuple[str, ...], targets: tuple[str, ...] = TARGETS) -> dict[str, torch.nn.Module]:
    """Name in the adapter's spelling (``text_model.`` always) -> module."""
    found = {}
    for part in parts:
        for path, module in getattr(pipe, part).named_modules():
            if path.endswith(targets) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                front = "text_model." if part.startswith("text_encoder") and not path.startswith("text_model.") else ""
                found[f"{part}.{front}{path}.weight"] = module
    return found


def adapter(
    pipe: Any, parts: tuple[str, ...], seed: int = 1, rank: int = 4, size: float = 0.1, name: str = "one"
) -> LoadedLora:
    """A random adapter of these parts, alpha half its rank."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    tensors = {}
    for weight, module in weights_of(pipe, parts).items():
        out, n_in, *kernel = module.weight.shape
        back = (1,) * len(kernel)
        tensors[weight] = (drawn(rank, n_in, *kernel), drawn(out, rank, *back))
    return LoadedLora.from_tensors(tensors, alpha=rank / 2, name=name)


def as_diffusers(lora: LoadedLora) -> dict[str, torch.Tensor]:
    """The state dict that diffusers loads, alpha in the factors' scale."""
    state = {}
    for weight, delta in lora.adapters.items():
        path = weight.removesuffix(".weight")
        a, b = (torch.from_numpy(np.array(factor.take())) for factor in delta.factors)
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = a, b * delta.scaling
    return state
