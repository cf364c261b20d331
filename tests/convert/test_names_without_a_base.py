"""kohya's names turned back without a base, against every module of full-size models; nothing is guessed."""

from __future__ import annotations

import pytest

from lorastack.base.foreign import ForeignNames
from lorastack.base.known_paths import known_path
from lorastack.base.originals import originals
from tests.formats.images import base_of, full_size, modules_of


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux", "sd3", "wan", "wan-i2v"])
def test_every_module_of_a_full_size_model_is_known(kind: str) -> None:
    parts = full_size(kind)
    names = ForeignNames(base_of(parts).shapes)
    unknown = []
    for part, model in parts.items():
        for module in modules_of(model):
            weight = f"{part}.{module}.weight"
            flat = names.kohya(weight)
            assert flat is not None
            found = known_path(flat)
            if found is None:
                unknown.append(weight)
            else:  # transformers 5 has taken CLIP's outer name away; files have it
                assert found.replace("text_model.", "") == weight.replace("text_model.", "")
    assert not unknown


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_so_are_the_block_names_of_a_unets_own_code(kind: str) -> None:
    unet = full_size(kind)["unet"]
    own = modules_of(unet)
    known = 0
    for original, (module,) in originals([name for name, _ in unet.named_modules()]):
        if module in own:
            found = known_path(f"lora_unet_{original.replace('.', '_')}")
            assert found == f"unet.{module}.weight"
            known += 1
    assert known == len(own)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_my_layer",
        "lora_unet_double_blocks_0_img_attn_qkv",  # three of diffusers' modules: how many rows each has, a base says
        "lora_te2_shared_",
        "lora_unet_",
        "lora_unet_down_blocks_0_attentions_00_proj_in_",
        "down_blocks_0_attentions_0_proj_in",
    ],
)
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    assert known_path(name) is None
