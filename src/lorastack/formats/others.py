"""Adapters of formats that are not read here: which one a safetensors file is by its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Collection

from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.peft_keys import PREFIX

_IN_DIFFUSERS = "which is not read yet; use it with diffusers (load_lora_weights)"
_IN_COMFYUI = "which is not read yet; use it with ComfyUI"
_LYCORIS = (
    "which is not read: its updates are no products B @ A of two small factors; use it with the program it was made for"
)
#: The first pattern that finds something in a name says what the file is. A whole prefix says more than an ending:
#: diffusers and ComfyUI end their names as PEFT does.
_KINDS = tuple(
    (re.compile(pattern, re.MULTILINE), said)
    for pattern, said in (
        (r":(up|down)",
         "a cloneofsimo adapter, keyed by position in one version of the model; convert it to PEFT or kohya"),
        (r"[._]lokr_", f"a LyCORIS (LoKr) adapter, {_LYCORIS}"),
        (r"[._]hada_", f"a LyCORIS (LoHa) adapter, {_LYCORIS}"),
        (r"^lycoris_|[._](oft_blocks|oft_diag|on_input|b1\.weight)$", f"a LyCORIS adapter, {_LYCORIS}"),
        (r"processor\.\w*lora\d", f"an XLabs (Flux) adapter, {_IN_COMFYUI}"),
        (r"^lora_(unet|te|te1|te2|te3|transformer|prior)_|\.lora_down\.weight$",
         "a kohya adapter, which is not read yet; convert it to PEFT"),
        (r"^diffusion_model\.", f"a ComfyUI (diffusion_model.) adapter, {_IN_COMFYUI}"),
        (r"_lora\.(down|up)\.|lora_linear_layer|\.processor\.", f"an old diffusers adapter, {_IN_DIFFUSERS}"),
        (r"^(unet|text_encoder(_\d)?|prior|controlnet|vae)\.", f"a diffusers adapter, {_IN_DIFFUSERS}"),
        # GPT-2 and others call their own body `transformer` too.
        (r"^(transformer(_\d)?\.)?(\w+_)?(transformer_)?blocks\.\d+\..*(attn\d?|ff|ffn|norm\d?|proj_\w+|\bto_\w)",
         f"a diffusers adapter, {_IN_DIFFUSERS}"),
        (r"^(down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks)\.",
         f"a diffusers adapter, {_IN_DIFFUSERS}"),
        (r"\.lora\.(down|up)\.weight$", f"a diffusers adapter, {_IN_DIFFUSERS}"),
        (r"^(double_blocks|single_blocks|joint_blocks|input_blocks|middle_block|output_blocks)\.",
         f"a ComfyUI adapter, {_IN_COMFYUI}"),
        (r"\.lora_[ab]$", "an MLX adapter, which is not read yet; convert it to PEFT"),
        (r"\.lora_(A|B|embedding_A|embedding_B)(\.[^.]+)?(\.weight)?$",
         f"PEFT weights without their {CONFIG_NAME}, which holds the scaling; put it beside them"),
    )
)  # fmt: skip
#: PEFT's own names may hold any of these further in: a module of the base.
_OF_PEFT = re.compile(rf"^(\w+\.)*{re.escape(PREFIX)}|^{re.escape(PREFIX)}", re.MULTILINE)


def describe(names: Collection[str], metadata: Collection[str] = ()) -> str:
    """Which kind of adapter has tensors of these names, and the way out."""
    text = "\n".join(names)
    kinds = _KINDS[-1:] if _OF_PEFT.search(text) else _KINDS
    if said := next((said for pattern, said in kinds if pattern.search(text)), None):
        if "lora_adapter_metadata" in metadata and said is _KINDS[-1][1]:
            return f"a diffusers adapter, {_IN_DIFFUSERS}"
        return said
    return f"no LoRA adapter: {len(names)} tensors such as {', '.join(list(names)[:3]) or 'none'}"


def is_peft(names: Collection[str]) -> bool:
    """Whether these are names of PEFT's own, with whatever other programs left around and in them."""
    return describe(names).startswith("PEFT")
