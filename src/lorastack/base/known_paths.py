"""What the modules of well-known image models are called, where no base is given that would say it.

kohya writes a path with ``_`` for ``.``, and which ``_`` was a dot the name alone does not say. So a name is turned
back only where it is one of these, and a model with other modules needs its base. ``{}`` is a number of a list, ``(a
b)`` either of the two. Read off the classes of diffusers and transformers.
"""

from __future__ import annotations

import itertools
import re
from functools import cache

from lorastack.base.originals import originals

_BLOCK = "(down_blocks.{} up_blocks.{} mid_block)"
_INNER = f"{_BLOCK}.attentions.{{}}.transformer_blocks.{{}}"
#: Model of a pipeline -> its modules.
_MODULES = {
    "unet": f"""
        {_INNER}.(attn1 attn2).(to_q to_k to_v to_out.0)
        {_INNER}.ff.net.(0.proj 2)
        {_INNER}.(norm1 norm2 norm3)
        {_BLOCK}.attentions.{{}}.(proj_in proj_out norm)
        {_BLOCK}.resnets.{{}}.(conv1 conv2 conv_shortcut time_emb_proj norm1 norm2)
        (down_blocks.{{}}.downsamplers.{{}} up_blocks.{{}}.upsamplers.{{}}).conv
        (time_embedding add_embedding).(linear_1 linear_2)
        (conv_in conv_out conv_norm_out)
    """,
    "transformer": """
        (transformer_blocks.{} single_transformer_blocks.{}).attn.(to_q to_k to_v norm_q norm_k)
        transformer_blocks.{}.(attn attn2).(add_q_proj add_k_proj add_v_proj to_out.0 to_add_out)
        transformer_blocks.{}.attn2.(to_q to_k to_v)
        transformer_blocks.{}.(ff ff_context).net.(0.proj 2)
        transformer_blocks.{}.(norm1 norm1_context).linear
        transformer_blocks.{}.(img_mlp txt_mlp).net.(0.proj 2)
        transformer_blocks.{}.(img_mod txt_mod).1
        single_transformer_blocks.{}.(proj_mlp proj_out norm.linear)
        blocks.{}.(attn1 attn2).(to_q to_k to_v to_out.0 add_k_proj add_v_proj)
        blocks.{}.ffn.net.(0.proj 2)
        (x_embedder context_embedder pos_embed.proj img_in txt_in proj_out norm_out.linear)
        time_text_embed.(timestep_embedder text_embedder guidance_embedder).(linear_1 linear_2)
        condition_embedder.(time_embedder text_embedder).(linear_1 linear_2)
        (condition_embedder.time_proj patch_embedding)
        condition_embedder.image_embedder.ff.net.(0.proj 2)
    """,
    "clip": """
        text_model.encoder.layers.{}.self_attn.(q_proj k_proj v_proj out_proj)
        text_model.encoder.layers.{}.mlp.(fc1 fc2)
        text_model.encoder.layers.{}.(layer_norm1 layer_norm2)
        text_model.embeddings.(token_embedding position_embedding)
        (text_model.final_layer_norm text_projection)
    """,
    "t5": """
        encoder.block.{}.layer.{}.SelfAttention.(q k v o relative_attention_bias)
        encoder.block.{}.layer.{}.DenseReluDense.(wi wi_0 wi_1 wo)
        encoder.block.{}.layer.{}.layer_norm
        (encoder.final_layer_norm shared)
    """,
}
#: kohya's front -> the models whose modules may stand behind it, and what they are called in a pipeline.
_FRONTS = {
    "lora_unet_": (("unet", "unet"), ("transformer", "transformer")),
    "lora_transformer_": (("transformer", "transformer"),),
    "lora_te_": (("clip", "text_encoder"),),
    "lora_te1_": (("clip", "text_encoder"),),
    "lora_te2_": (("clip", "text_encoder_2"), ("t5", "text_encoder_2")),
    "lora_te3_": (("t5", "text_encoder_3"),),
}


def known_path(name: str) -> str | None:
    """The weight of a pipeline that kohya calls ``name``; None where no well-known model, or more than one, has it.

    >>> known_path("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0")
    'unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight'
    >>> known_path("lora_unet_input_blocks_4_1_proj_in"), known_path("lora_te2_my_own_layer")
    ('unet.down_blocks.1.attentions.0.proj_in.weight', None)
    """
    for front, models in _FRONTS.items():
        if name.startswith(front):
            rest = name[len(front) :]
            found = {f"{called}.{path}.weight" for model, called in models for path in _paths(model, rest)}
            return found.pop() if len(found) == 1 else None
    return None


def _paths(model: str, flat: str) -> set[str]:
    """The modules of a model whose path is ``flat`` with ``_`` for ``.``."""
    parts = flat.split("_")
    numbers = [part for part in parts if _is_number(part)]
    shape = "_".join("{}" if _is_number(part) else part for part in parts)
    found = {
        template.format(*(n for n, fixed in zip(numbers, said, strict=True) if not fixed))
        for template, said in _by_shape(model).get(shape, ())
        if all(fixed in ("", n) for n, fixed in zip(numbers, said, strict=True))
    }
    return found | ({_flat_originals()[flat]} if model == "unet" and flat in _flat_originals() else set())


@cache
def _by_shape(model: str) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """A flat path without its numbers -> the paths of that shape, each with the numbers that are its own."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for template in _templates(_MODULES[model]):
        parts = template.replace(".", "_").split("_")
        shape = "_".join("{}" if _is_number(part) else part for part in parts)
        said = tuple("" if part == "{}" else part for part in parts if part == "{}" or _is_number(part))
        found.setdefault(shape, []).append((template, said))
    return found


def _templates(rows: str) -> list[str]:
    """Every path that the rows spell out, ``{}`` for numbers."""
    found: dict[str, None] = {}
    for row in rows.strip().splitlines():
        parts = [part.split() for part in re.findall(r"\(([^)]*)\)", row)]
        pattern = re.sub(r"\([^)]*\)", "\0", row.strip())
        for choice in itertools.product(*parts):
            pieces = pattern.split("\0")
            found["".join(a + b for a, b in itertools.zip_longest(pieces, choice, fillvalue=""))] = None
    return list(found)


@cache
def unet_originals() -> dict[str, str]:
    """Original name -> module, of Stable Diffusion's UNets, 1, 2 and XL, whose blocks have two layers each."""
    modules = [
        template.format(*numbers)
        for template in _templates(_MODULES["unet"])
        for numbers in itertools.product(*(_LISTS[name] for name in re.findall(r"(\w+)\.{}", template)))
    ]
    # Down go two resnets in each block and up three; which blocks have attention decides where a sampler stands.
    modules = [module for module in modules if module.startswith("up_blocks") or not _THIRD.match(module)]
    found: dict[str, str] = {}
    for without in (("none",), ("up_blocks.0.",), ("up_blocks.2.", "up_blocks.3.")):
        here = [module for module in modules if ".attentions." not in module or not module.startswith(without)]
        for original, (module,) in originals(here):
            if found.setdefault(original, module) != module:
                found[original] = ""
    return {original: module for original, module in found.items() if module}


@cache
def _flat_originals() -> dict[str, str]:
    return {original.replace(".", "_"): module for original, module in unet_originals().items()}


#: Lists of a UNet -> the numbers in them.
_LISTS = {
    "down_blocks": range(4),
    "up_blocks": range(4),
    "resnets": range(3),
    "attentions": range(3),
    "transformer_blocks": range(10),
    "downsamplers": range(1),
    "upsamplers": range(1),
}
#: What only an upward block has: a third resnet; and the middle has one attention.
_THIRD = re.compile(r".*(resnets|attentions)\.2\.|mid_block\.attentions\.1\.")


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()
