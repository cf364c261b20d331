"""Small Stable Diffusion pipelines under the names of the first code, as single-file checkpoints have them.

Written from diffusers' names, and held against diffusers' own way from there back in the tests that use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_names(names: list[str], layers: int = 2) -> dict[str, str]:
    """diffusers' name -> the first code's, with ``layers`` in each block."""
    with_attention = {m[1] for name in names if (m := re.match(r"(up_blocks\.\d+)\.attentions", name))}
    found = {}
    for name in names:
        path, _, ending = name.rpartition(".")
        parts = path.split(".")
        if path in _UNET:
            new = _UNET[path]
        elif parts[0] == "mid_block":
            at = 1 if parts[1] == "attentions" else 2 * int(parts[2])
            new = f"middle_block.{at}.{_inner(parts[3:])}"
        elif parts[2] == "downsamplers":
            new = f"input_blocks.{(int(parts[1]) + 1) * (layers + 1)}.0.op"
        elif parts[2] == "upsamplers":
            second = 2 if ".".join(parts[:2]) in with_attention else 1
            new = f"output_blocks.{int(parts[1]) * (layers + 1) + layers}.{second}.conv"
        else:
            side, first = ("input", 1) if parts[0] == "down_blocks" else ("output", 0)
            at = int(parts[1]) * (layers + 1) + int(parts[3]) + first
            new = f"{side}_blocks.{at}.{int(parts[2] == 'attentions')}.{_inner(parts[4:])}"
        found[name] = f"model.diffusion_model.{new}.{ending}"
    return found


def _inner(parts: list[str]) -> str:
    inner = ".".join(parts)
    return _RESNET.get(inner, inner)


def vae_names(names: list[str], levels: int) -> dict[str, str]:
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found = {}
    for name in names:
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1")
        if ".mid.attn_1." in new:
            front, _, rest = new.partition(".mid.attn_1.")
            layer, _, ending = rest.rpartition(".")
            new = f"{front}.mid.attn_1.{attention[layer]}.{ending}"
        new = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
        found[name] = f"first_stage_model.{new}"
    return found


def original_vae(state: State, levels: int) -> State:
    names = vae_names(list(state), levels)
    # The first code has convolutions of one pixel where diffusers has linear layers.
    return {
        names[name]: tensor[..., None, None] if ".attn_1." in names[name] and tensor.dim() == 2 else tensor
        for name, tensor in state.items()
    }


def original_clip(state: State, front: str) -> State:
    return {f"{front}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def original_open_clip(state: State, front: str) -> State:
    """OpenCLIP's: q, k and v in one tensor, the projection turned over."""
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer |= {"self_attn.out_proj": "attn.out_proj"}
    top = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    found: State = {f"{front}logit_scale": torch.zeros(())}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found[f"{front}text_projection"] = tensor.T.contiguous()
        elif name in top:
            found[front + top[name]] = tensor
        else:
            _, _, number, inner = name.split(".", 3)
            module, _, ending = inner.rpartition(".")
            block = f"{front}transformer.resblocks.{number}."
            if module in layer:
                found[f"{block}{layer[module]}.{ending}"] = tensor
            elif module == "self_attn.q_proj":
                q = name.rpartition("q_proj")[0]
                three = [state[key] for key in _qkv(state, q, ending)]
                found[f"{block}attn.in_proj_{ending}"] = torch.cat(three)
    return found


def _qkv(state: Mapping[str, Any], front: str, ending: str) -> list[str]:
    own = "text_model." if any(name.startswith("text_model.") for name in state) else ""
    return [f"{own}{front}{letter}_proj.{ending}" for letter in "qkv"]


def checkpoint(pipe: Any) -> State:
    """The whole pipeline as one state dict, with what else such files hold."""
    unet = pipe.unet.state_dict()
    names = unet_names(list(unet), pipe.unet.config.layers_per_block)
    found: State = {names[name]: tensor for name, tensor in unet.items()}
    found |= original_vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))
    if hasattr(pipe, "text_encoder_2"):
        front = "conditioner.embedders."
        found |= original_clip(pipe.text_encoder.state_dict(), f"{front}0.transformer.")
        found |= original_open_clip(pipe.text_encoder_2.state_dict(), f"{front}1.model.")
    else:
        found |= original_clip(pipe.text_encoder.state_dict(), "cond_stage_model.transformer.")
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    found["alphas_cumprod"] = torch.linspace(1, 0, 10)
    return {name: tensor.contiguous() for name, tensor in found.items()}
