"""Which format a safetensors file of an adapter has, by its tensors' names; and those that are not read here."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.peft_keys import PREFIX

#: The readers that take a single file.
Reader = Literal["kohya", "diffusers", "mlx", "peft"]

#: The first pattern that finds something in a name says what the file is: a reader's name, or why there is none. A
#: whole prefix says more than an ending: diffusers and ComfyUI end their names as PEFT does.
_KINDS: tuple[tuple[re.Pattern[str], Reader | str], ...] = tuple(
    (re.compile(pattern, re.MULTILINE), said)
    for pattern, said in (
        (r":(up|down)$",
         "a cloneofsimo adapter, keyed by position in one version of the model; convert it to PEFT or kohya"),
        (r"processor\.\w*lora\d", "an XLabs (Flux) adapter, which is not read; use it with ComfyUI"),
        (r"^lora_(unet|te|te1|te2|te3|transformer|prior)_|^lycoris_|\.lora_down\.weight$|\.dora_scale$", "kohya"),
        (r"[._](lokr_(w[12]|t2)|hada_(w[12]|t[12])|oft_blocks|oft_diag|on_input|b1\.weight)", "kohya"),
        (r"^diffusion_model\.|^text_encoders\.", "kohya"),
        (r"_lora\.(down|up)\.|lora_linear_layer|\.processor\.", "diffusers"),
        (r"^(unet|text_encoder(_\d)?|prior)\.", "diffusers"),
        (r"^(controlnet|vae)\.", "an adapter of a ControlNet or VAE, which is not read; use it with diffusers"),
        # GPT-2 and others call their own body `transformer` too.
        (r"^(transformer(_\d)?\.)?(\w+_)?(transformer_)?blocks\.\d+\..*(attn\d?|ff|ffn|norm\d?|proj_\w+|\bto_\w)",
         "diffusers"),
        (r"^(down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks)\.", "diffusers"),
        (r"\.lora\.(down|up)\.weight$", "diffusers"),
        (r"^(double_blocks|single_blocks|joint_blocks|input_blocks|middle_block|output_blocks)\.", "kohya"),
        (r"\.lora_[ab]$", "mlx"),
        (r"\.lora_(A|B|embedding_A|embedding_B)(\.[^.]+)?(\.weight)?$", "peft"),
    )
)  # fmt: skip
#: PEFT's own names may hold any of these further in: a module of the base.
_OF_PEFT = re.compile(rf"^(\w+\.)*{re.escape(PREFIX)}|^{re.escape(PREFIX)}", re.MULTILINE)
#: Fronts that say it at once: nearly every file is one of these, and looking for all patterns costs more than opening.
_AT_ONCE: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"), "kohya"),
    (("unet.", "text_encoder."), "diffusers"),
)


def reader_of(names: Collection[str], metadata: Collection[str] = ()) -> Reader | str:
    """The reader that takes a file with tensors of these names, or what it is and the way out.

    >>> reader_of(["lora_te_x.lora_up.weight"]), reader_of(["unet.mid_block.x.lora_A.weight"])
    ('kohya', 'diffusers')
    """
    first = next(iter(names), "")
    for fronts, reader in _AT_ONCE:
        if first.startswith(fronts) and ":" not in first and "processor." not in first:
            return reader
    text = "\n".join(names)
    kinds = _KINDS[-1:] if _OF_PEFT.search(text) else _KINDS
    if said := next((said for pattern, said in kinds if pattern.search(text)), None):
        return "diffusers" if said == "peft" and "lora_adapter_metadata" in metadata else said
    return f"no LoRA adapter: {len(names)} tensors such as {', '.join(list(names)[:3]) or 'none'}"


#: Of a reader that needs another file beside the weights: what a file without it is.
WITHOUT = {
    "mlx": f"an MLX adapter without its {CONFIG_NAME}, which holds the scaling; put it beside it",
    "peft": f"PEFT weights without their {CONFIG_NAME}, which holds the scaling; put it beside them",
}
