"""Block weights: every weight of real models is in the block that its original name says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from lorastack import LoadedLora, block_weights
from lorastack.base.blocks import LAYOUTS, PRESETS, block_of
from lorastack.cli import app
from lorastack.errors import ArgumentError, UnknownNameError
from tests.originals import unet_names

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
}


def unet_weights(**config: object) -> dict[str, str]:
    """diffusers' name -> the first code's, of all that a full-size UNet has."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    return unet_names(list(model.state_dict()))


def said_block(original: str) -> str | None:
    """The block that a name of the first code says."""
    match = re.match(r"model\.diffusion_model\.(input_blocks|output_blocks|middle_block)\.(\d+)\.", original)
    if match is None:
        return None
    side = {"input_blocks": "IN", "output_blocks": "OUT", "middle_block": "M"}[match[1]]
    return "M00" if side == "M" else f"{side}{int(match[2]):02}"


@pytest.mark.parametrize("config", [{"cross_attention_dim": 768}, XL], ids=["sd", "sdxl"])
def test_every_weight_of_a_unet_is_in_the_block_of_its_original_name(config: dict[str, object]) -> None:
    for name, original in unet_weights(**config).items():
        wanted = said_block(original)
        kohya = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        kohya_original = "lora_unet_" + original.removeprefix("model.diffusion_model.").replace(".", "_")
        for spelt in (name, f"unet.{name}", kohya, kohya_original, original, original.removeprefix("model.")):
            found = block_of(spelt)
            assert (found and found[0]) == wanted, spelt


def lora_of(names: list[str]) -> LoadedLora:
    return LoadedLora.from_tensors({name: (np.ones((1, 2)), np.ones((2, 1))) for name in names}, name="one")


#: What a LoRA for SD 1.5 changes: attention only, as kohya writes it.
SD = [
    *(f"lora_unet_down_blocks_{b}_attentions_{n}_proj_in" for b in range(3) for n in range(2)),
    "lora_unet_mid_block_attentions_0_proj_in",
    *(f"lora_unet_up_blocks_{b}_attentions_{n}_proj_in" for b in (1, 2, 3) for n in range(3)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
]


def test_seventeen_numbers_go_to_seventeen_blocks_in_order() -> None:
    numbers = [0.5 + n for n in range(17)]
    found = block_weights(SD, numbers)
    wanted = dict(zip([SD[-1], *SD[:-1]], numbers, strict=True))
    scaled = lora_of(SD).scaled(found)
    assert {name: delta.scaling for name, delta in scaled.adapters.items()} == wanted
    assert block_weights(SD, ",".join(map(str, numbers))) == found
    dotted = [
        "unet.down_blocks.0.attentions.0.proj_in.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
    ]
    assert block_weights(dotted, numbers) == {"unet.down_blocks.0.attentions.0.*": 1.5, "text_encoder.*": 0.5}


#: As sd-webui-lora-block-weight has them.
TABLE = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_the_table(preset: str) -> None:
    assert block_weights(SD, preset) == block_weights(SD, TABLE[preset])


def test_presets_take_blocks_between_theirs_along() -> None:
    xl = [f"lora_unet_{side}_blocks_{n}_1_proj_in" for side in ("input", "output") for n in range(9)]
    found = {preset: [int(factor) for factor in block_weights(xl, preset).values()] for preset in PRESETS[3:]}
    assert found == {
        "INS": [1] * 5 + [0] * 13,
        "IND": [0] * 5 + [1] * 4 + [0] * 9,
        "INALL": [1] * 9 + [0] * 9,
        "MIDD": [0] * 5 + [1] * 11 + [0] * 2,
        "OUTD": [0] * 9 + [1] * 7 + [0] * 2,
        "OUTS": [0] * 16 + [1] * 2,
        "OUTALL": [0] * 9 + [1] * 9,
    }
    with pytest.raises(ArgumentError, match="have no number for D03"):
        block_weights(["lora_unet_double_blocks_3_img_attn_qkv"], "MIDD")


def test_flux() -> None:
    names = [
        "lora_unet_double_blocks_3_img_attn_qkv",
        "transformer.transformer_blocks.18.attn.to_q.weight",
        "diffusion_model.single_blocks.37.linear1.weight",
        "transformer.single_transformer_blocks.2.proj_mlp.weight",
    ]
    numbers = [float(n) for n in range(57)]
    assert list(block_weights(names, numbers).values()) == [3, 18, 56, 21]
    ends = ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    ends += ["transformer.x_embedder.weight", "lora_unet_final_layer_linear"]
    with pytest.raises(ArgumentError, match=r"57 block weights have no number for CLIP, IN, OUT, T5.*give 61 numbers"):
        block_weights(names + ends, numbers)
    whole = [float(n) for n in range(61)]
    assert list(block_weights(names + ends, whole).values()) == [6, 21, 59, 24, 0, 1, 2, 60]


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    xl = ["lora_unet_output_blocks_0_1_proj_in", "lora_unet_input_blocks_4_1_proj_in"]
    with pytest.raises(ArgumentError) as caught:
        block_weights(xl, [1.0] * 17)
    assert str(caught.value) == (
        "these 17 block weights have no number for OUT00, which the adapter has; give 12 numbers (SDXL) or 20 numbers "
        "(SDXL with convolutions) or 26 numbers (any UNet)"
    )
    assert set(block_weights(xl, "ALL").values()) == {1.0}
    with pytest.raises(UnknownNameError, match=r"no block weights 'MID'; presets are NONE, ALL.* did you mean MIDD"):
        block_weights(SD, "MID")
    with pytest.raises(ArgumentError, match=r"there are 3 block weights; expected 12 \(SDXL\), 17 \(SD 1.5\)"):
        block_weights(SD, [1, 2, 3])
    with pytest.raises(ArgumentError) as caught:
        block_weights(SD, ["R", *[1.0] * 15, float("inf")])
    assert caught.value.problems == ("BASE is 'R'", "OUT11 is inf")
    with pytest.raises(ArgumentError, match=r"no weight is of a block .*such as model.layers.0.q_proj.weight"):
        block_weights(["model.layers.0.q_proj.weight"], "ALL")


def test_layouts_have_as_many_ids_as_they_say() -> None:
    assert all(len(ids) == count == len(set(ids)) for count, ids in LAYOUTS.items())


def test_the_command_bakes_with_block_weights_and_says_the_patterns(tmp_path: Path) -> None:
    names = [f"unet.down_blocks.{b}.attentions.0.proj_in.weight" for b in range(3)]
    lora_of(names).save(tmp_path / "one")
    words = ["bake", f"{tmp_path / 'one'}:0.5", "-o", str(tmp_path / "out"), "--lbw"]
    done = CliRunner().invoke(app, [*words, "one=INS"])
    assert done.exit_code == 0, done.output
    assert "one: unet.down_blocks.2.attentions.0.* times 0" in done.output
    baked = LoadedLora.load(tmp_path / "out")
    sizes = {name: float((d.scaling * d.b.astype(np.float64) @ d.a).max()) for name, d in baked.adapters.items()}
    assert sizes == {names[0]: 0.5, names[1]: 0.5, **{name: 0.0 for name in names[2:] if name in sizes}}
    again = tmp_path / "again"
    assert CliRunner().invoke(app, [*words[:3], str(again), "--lbw", "two=INS"]).exit_code == 1
    assert CliRunner().invoke(app, [*words[:3], str(again), "--lbw", "INS"]).exit_code == 1
    assert not again.exists()
