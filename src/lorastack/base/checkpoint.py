"""What single-file checkpoints of Stable Diffusion (1.x, 2.x, XL) call their weights, in the words of diffusers.

The names are those of the first code: of latent diffusion (ldm/modules/diffusionmodules/openaimodel.py and model.py),
of transformers' CLIP, and of OpenCLIP, which keeps q, k and v in one tensor and its projection turned over.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lorastack.base.originals import UNET_RESNET, UNET_TOP

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
#: Where the text encoders lie, and which part of a pipeline each is; those of OpenCLIP have names of their own.
_CLIP = {"cond_stage_model.transformer.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder"}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",
}
_UNET_RESNET = {own: name for name, own in UNET_RESNET.items()}
_MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_OPEN_CLIP_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.(\d)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)\.(\d{1,4})\.(block|attn|downsample|upsample)\.(.+)")
_MIDDLE_BLOCK = re.compile(r"middle_block\.([0-2])\.(.+)")
_VAE_MIDDLE_BLOCK = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)")
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
#: Where a block of the UNet makes the picture smaller, which is its last layer.
_DOWNSAMPLER = re.compile(re.escape(_UNET) + r"input_blocks\.(\d{1,4})\.0\.op\.weight")


class Piece(NamedTuple):
    """A weight in diffusers' words, and where it is in its tensor.

    ``third`` is the part of a tensor of three weights, side by side as rows; ``turned`` says that it is kept so.
    """

    name: str
    third: int | None = None
    turned: bool = False


def is_original(keys: Collection[str]) -> bool:
    """Whether these are the tensors of such a checkpoint."""
    return any(key.startswith((_UNET, _VAE, *_CLIP, *_OPEN_CLIP)) for key in keys)


class OriginalNames:
    """The names of one checkpoint, whose tensors say how many layers its blocks have."""

    def __init__(self, keys: Collection[str]) -> None:
        downsamplers = [int(match[1]) for key in keys if (match := _DOWNSAMPLER.fullmatch(key))]
        self._layers = min((number for number in downsamplers if number), default=3)  # block 0 is the first convolution
        levels = [int(m[3]) for key in keys if (m := _VAE_BLOCK.fullmatch(key.removeprefix(_VAE))) and m[2] == "up"]
        self._levels = max(levels, default=-1) + 1
        self.is_xl = any(key.startswith("conditioner.") for key in keys)

    def pieces(self, key: str) -> Iterator[Piece]:
        """The weights that the tensor ``key`` is; none for what no model of the pipeline has.

        >>> names = OriginalNames(["model.diffusion_model.input_blocks.3.0.op.weight"])
        >>> key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
        >>> [piece.name for piece in names.pieces(key)]
        ['unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight']
        >>> key = "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_bias"
        >>> [(piece.name.rpartition("7.")[2], piece.third) for piece in names.pieces(key)]
        [('self_attn.q_proj.bias', 0), ('self_attn.k_proj.bias', 1), ('self_attn.v_proj.bias', 2)]
        """
        if key.startswith(_UNET):
            if found := self._unet(key.removeprefix(_UNET)):
                yield Piece(f"unet.{found}")
        elif key.startswith(_VAE):
            yield Piece(f"vae.{self._vae(key.removeprefix(_VAE))}")
        else:
            for front, part in _CLIP.items():
                if key.startswith(front) and not key.endswith(".position_ids"):  # numbers in order, and no weight
                    yield Piece(f"{part}.{key.removeprefix(front)}")
            for front, part in _OPEN_CLIP.items():
                if key.startswith(front):
                    for name, third, turned in _open_clip(key.removeprefix(front)):
                        yield Piece(f"{part}.{name}", third, turned)

    def _unet(self, path: str) -> str | None:
        match = _BLOCK.fullmatch(path)
        path, _, ending = path.rpartition(".")
        if path in UNET_TOP:
            return f"{UNET_TOP[path]}.{ending}"
        if middle := _MIDDLE_BLOCK.fullmatch(path):
            return f"{_MIDDLE[int(middle[1])]}.{_UNET_RESNET.get(middle[2], middle[2])}.{ending}"
        if match is None or (match[1] == "input" and int(match[2]) == 0):
            return None
        down, second, inner = match[1] == "input", match[3] != "0", match[4].rpartition(".")[0]
        block, layer = divmod(int(match[2]) - down, self._layers)
        side = "down" if down else "up"
        if down and inner == "op":
            return f"down_blocks.{block}.downsamplers.0.conv.{ending}"
        if not down and inner == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv.{ending}"
        kind = "attentions" if second else "resnets"
        return f"{side}_blocks.{block}.{kind}.{layer}.{_UNET_RESNET.get(inner, inner)}.{ending}"

    def _vae(self, path: str) -> str:
        if match := _VAE_BLOCK.fullmatch(path):
            coder, side, number, kind, inner = match.groups()
            block = int(number) if side == "down" else self._levels - 1 - int(number)
            if kind in ("downsample", "upsample"):
                return f"{coder}.{side}_blocks.{block}.{kind}rs.0.{inner}"
            group = "resnets" if kind == "block" else "attentions"
            return f"{coder}.{side}_blocks.{block}.{group}.{inner.replace('nin_shortcut', 'conv_shortcut')}"
        if match := _VAE_MIDDLE_BLOCK.fullmatch(path):
            coder, kind, inner = match.groups()
            if kind == "attn_1":
                layer, _, ending = inner.rpartition(".")
                inner = f"{_VAE_ATTENTION.get(layer, layer)}.{ending}"
            return f"{coder}.mid_block.{_VAE_MIDDLE[kind]}.{inner}"
        return path.replace(".norm_out.", ".conv_norm_out.")


def _open_clip(path: str) -> Iterator[Piece]:
    """The weights of one of OpenCLIP's tensors; none for its temperature, which only training has."""
    if path in _OPEN_CLIP_TOP:
        yield Piece(_OPEN_CLIP_TOP[path])
    elif path in ("text_projection", "text_projection.weight"):
        yield Piece("text_projection.weight", turned=path == "text_projection")
    elif match := _OPEN_CLIP_BLOCK.fullmatch(path):
        inner = match[2]
        layer = f"text_model.encoder.layers.{match[1]}"
        if inner.startswith("attn.in_proj_"):
            ending = inner.removeprefix("attn.in_proj_")
            for third, letter in enumerate("qkv"):
                yield Piece(f"{layer}.self_attn.{letter}_proj.{ending}", third)
        else:
            module, _, ending = inner.rpartition(".")
            if module in _OPEN_CLIP_LAYER:
                yield Piece(f"{layer}.{_OPEN_CLIP_LAYER[module]}.{ending}")
