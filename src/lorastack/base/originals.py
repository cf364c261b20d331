"""What image models' own code calls their modules, and what diffusers calls the same: data, and how a UNet is counted.

A row is ``original -> diffusers``, ``{}`` for a block's number. ``stem(name name)`` on the right is one module of the
original cut by rows, in this order. ``~`` before a name: its two halves of rows are the other way round (scale and
shift of the last norm). Read off diffusers/loaders/single_file_utils.py (``convert_flux_transformer_checkpoint_to_
diffusers`` and those of SD3 and Wan) and sd-scripts/networks/convert_flux_lora.py. Either side may be looked up by the
other. Qwen-Image's own code has diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

#: Flux (Black Forest Labs).
_FLUX = """
double_blocks.{}.img_attn.qkv -> transformer_blocks.{}.attn.(to_q to_k to_v)
double_blocks.{}.txt_attn.qkv -> transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)
double_blocks.{}.img_attn.proj -> transformer_blocks.{}.attn.to_out.0
double_blocks.{}.txt_attn.proj -> transformer_blocks.{}.attn.to_add_out
double_blocks.{}.img_attn.norm.query_norm -> transformer_blocks.{}.attn.norm_q
double_blocks.{}.img_attn.norm.key_norm -> transformer_blocks.{}.attn.norm_k
double_blocks.{}.txt_attn.norm.query_norm -> transformer_blocks.{}.attn.norm_added_q
double_blocks.{}.txt_attn.norm.key_norm -> transformer_blocks.{}.attn.norm_added_k
double_blocks.{}.img_mlp.0 -> transformer_blocks.{}.ff.net.0.proj
double_blocks.{}.img_mlp.2 -> transformer_blocks.{}.ff.net.2
double_blocks.{}.txt_mlp.0 -> transformer_blocks.{}.ff_context.net.0.proj
double_blocks.{}.txt_mlp.2 -> transformer_blocks.{}.ff_context.net.2
double_blocks.{}.img_mod.lin -> transformer_blocks.{}.norm1.linear
double_blocks.{}.txt_mod.lin -> transformer_blocks.{}.norm1_context.linear
single_blocks.{}.linear1 -> single_transformer_blocks.{}.(attn.to_q attn.to_k attn.to_v proj_mlp)
single_blocks.{}.linear2 -> single_transformer_blocks.{}.proj_out
single_blocks.{}.modulation.lin -> single_transformer_blocks.{}.norm.linear
single_blocks.{}.norm.query_norm -> single_transformer_blocks.{}.attn.norm_q
single_blocks.{}.norm.key_norm -> single_transformer_blocks.{}.attn.norm_k
img_in -> x_embedder
txt_in -> context_embedder
time_in.in_layer -> time_text_embed.timestep_embedder.linear_1
time_in.out_layer -> time_text_embed.timestep_embedder.linear_2
vector_in.in_layer -> time_text_embed.text_embedder.linear_1
vector_in.out_layer -> time_text_embed.text_embedder.linear_2
guidance_in.in_layer -> time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer -> time_text_embed.guidance_embedder.linear_2
final_layer.linear -> proj_out
final_layer.adaLN_modulation.1 -> ~norm_out.linear
"""
#: Stable Diffusion 3. Its last block has no output of the text and a norm of the final kind there.
_SD3 = """
joint_blocks.{}.x_block.attn.qkv -> transformer_blocks.{}.attn.(to_q to_k to_v)
joint_blocks.{}.context_block.attn.qkv -> transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)
joint_blocks.{}.x_block.attn2.qkv -> transformer_blocks.{}.attn2.(to_q to_k to_v)
joint_blocks.{}.x_block.attn.proj -> transformer_blocks.{}.attn.to_out.0
joint_blocks.{}.x_block.attn2.proj -> transformer_blocks.{}.attn2.to_out.0
joint_blocks.{}.context_block.attn.proj -> transformer_blocks.{}.attn.to_add_out
joint_blocks.{}.x_block.mlp.fc1 -> transformer_blocks.{}.ff.net.0.proj
joint_blocks.{}.x_block.mlp.fc2 -> transformer_blocks.{}.ff.net.2
joint_blocks.{}.context_block.mlp.fc1 -> transformer_blocks.{}.ff_context.net.0.proj
joint_blocks.{}.context_block.mlp.fc2 -> transformer_blocks.{}.ff_context.net.2
joint_blocks.{}.x_block.adaLN_modulation.1 -> transformer_blocks.{}.norm1.linear
joint_blocks.{}.context_block.adaLN_modulation.1 -> transformer_blocks.{}.norm1_context.linear
x_embedder.proj -> pos_embed.proj
t_embedder.mlp.0 -> time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 -> time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 -> time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 -> time_text_embed.text_embedder.linear_2
"""
_WAN = """
blocks.{}.self_attn.q -> blocks.{}.attn1.to_q
blocks.{}.self_attn.k -> blocks.{}.attn1.to_k
blocks.{}.self_attn.v -> blocks.{}.attn1.to_v
blocks.{}.self_attn.o -> blocks.{}.attn1.to_out.0
blocks.{}.self_attn.norm_q -> blocks.{}.attn1.norm_q
blocks.{}.self_attn.norm_k -> blocks.{}.attn1.norm_k
blocks.{}.cross_attn.q -> blocks.{}.attn2.to_q
blocks.{}.cross_attn.k -> blocks.{}.attn2.to_k
blocks.{}.cross_attn.v -> blocks.{}.attn2.to_v
blocks.{}.cross_attn.o -> blocks.{}.attn2.to_out.0
blocks.{}.cross_attn.norm_q -> blocks.{}.attn2.norm_q
blocks.{}.cross_attn.norm_k -> blocks.{}.attn2.norm_k
blocks.{}.cross_attn.k_img -> blocks.{}.attn2.add_k_proj
blocks.{}.cross_attn.v_img -> blocks.{}.attn2.add_v_proj
blocks.{}.cross_attn.norm_k_img -> blocks.{}.attn2.norm_added_k
blocks.{}.ffn.0 -> blocks.{}.ffn.net.0.proj
blocks.{}.ffn.2 -> blocks.{}.ffn.net.2
blocks.{}.norm3 -> blocks.{}.norm2
time_embedding.0 -> condition_embedder.time_embedder.linear_1
time_embedding.2 -> condition_embedder.time_embedder.linear_2
text_embedding.0 -> condition_embedder.text_embedder.linear_1
text_embedding.2 -> condition_embedder.text_embedder.linear_2
time_projection.1 -> condition_embedder.time_proj
img_emb.proj.0 -> condition_embedder.image_embedder.norm1
img_emb.proj.1 -> condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3 -> condition_embedder.image_embedder.ff.net.2
img_emb.proj.4 -> condition_embedder.image_embedder.norm2
head.head -> proj_out
"""
#: Stable Diffusion's UNet: modules outside its blocks.
UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
#: diffusers' name of a module inside one of its blocks with time -> its own.
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.([01])\.(.+)")
_NUMBER = re.compile(r"(?<![^.])\d{1,4}(?![^.])")

#: (original, names on the right) of every row that is a pattern.
_ROWS = [(original, (name,)) for original, name in UNET_TOP.items()] + [
    (left, tuple(stem + name for name in names.removesuffix(")").split()) if names else (stem,))
    for line in "".join((_FLUX, _SD3, _WAN)).splitlines()
    if line
    for left, right in [line.split(" -> ")]
    for stem, _, names in [right.partition("(")]
]


def originals(modules: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original name, the modules it is) of everything in a model with these modules that its own code names otherwise.

    >>> list(originals(["blocks.3.attn1.to_q", "norm_out.linear"]))
    [('final_layer.adaLN_modulation.1', ('~norm_out.linear',)), ('blocks.3.self_attn.q', ('blocks.3.attn1.to_q',))]
    """
    numbers: dict[str, list[str]] = {}
    for module in modules:
        first = _NUMBER.search(module)
        if first:
            numbers.setdefault(f"{module[: first.start()]}{{}}{module[first.end() :]}", []).append(first[0])
    for original, targets in _ROWS:
        if "{}" not in original:
            if all(target.removeprefix("~") in modules for target in targets):
                yield original, targets
            continue
        for number in numbers.get(targets[0], ()):
            found = tuple(target.replace("{}", number, 1) for target in targets)
            if all(target in modules for target in found):
                yield original.replace("{}", number, 1), found
    yield from _of_last_sd3_block(modules)
    yield from _of_unet(modules)


def _of_last_sd3_block(modules: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Stable Diffusion 3's last block has the halves of its text's norm turned, being the last norm of it."""
    if "pos_embed.proj" not in modules:
        return
    last = max((int(m.split(".")[1]) for m in modules if m.startswith("transformer_blocks.")), default=-1)
    if f"transformer_blocks.{last}.attn.to_add_out" not in modules and last >= 0:
        norm = f"transformer_blocks.{last}.norm1_context.linear"
        if norm in modules:
            yield f"joint_blocks.{last}.context_block.adaLN_modulation.1", (f"~{norm}",)


def _of_unet(modules: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A UNet's blocks are counted through: each resnet, with the attention behind it, is one, and each sampler."""
    matches = [match for module in modules if (match := _BLOCK.fullmatch(module))]
    layers = 1 + max((int(m[4]) for m in matches if m[1] == "down" and m[3] == "resnets"), default=-1)
    with_attention = {int(m[2]) for m in matches if m[1] == "up" and m[3] == "attentions"}
    for match in matches if layers else ():
        side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind in ("resnets", "attentions"):
            at = 1 + block * (layers + 1) + number if side == "down" else block * (layers + 1) + number
            inner = "0" if kind == "resnets" else "1"
        elif kind == "downsamplers":
            at, inner, rest = (block + 1) * (layers + 1), "0", rest.replace("conv", "op")
        else:
            at, inner = block * (layers + 1) + layers, "2" if block in with_attention else "1"
        rest = UNET_RESNET.get(rest, rest) if kind == "resnets" else rest
        yield f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}.{rest}", (match[0],)
    for module in modules:
        if match := _MIDDLE.fullmatch(module):
            number = 1 if match[1] == "attentions" else 2 * int(match[2])
            rest = UNET_RESNET.get(match[3], match[3]) if match[1] == "resnets" else match[3]
            yield f"middle_block.{number}.{rest}", (module,)
