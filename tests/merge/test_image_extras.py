"""Updates of full rank are merged exactly, under the names that the base has; live use refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lorastack import LoraStack, load
from lorastack.errors import LoraStackError, NamingError, UnsupportedError
from lorastack.merging import merge
from lorastack.torch import attach

SHAPES = {
    "unet.plain.weight": (6, 4),
    "unet.plain.bias": (6,),
    "unet.conv.weight": (6, 4, 3, 3),
    "unet.norm.weight": (6,),
    "transformer.transformer_blocks.0.attn.to_q.weight": (3, 4),
    "transformer.transformer_blocks.0.attn.to_k.weight": (2, 4),
    "transformer.transformer_blocks.0.attn.to_v.weight": (2, 4),
    "unet.untouched.weight": (2, 2),
}


def numbers(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    save_file(numbers(SHAPES, 0), folder / "model.safetensors")
    return folder


ADAPTER = {
    "lora_unet_plain.lora_down.weight": (2, 4),
    "lora_unet_plain.lora_up.weight": (6, 2),
    "lora_unet_plain.diff_b": (6,),
    "lora_unet_conv.lokr_w1": (2, 2),
    "lora_unet_conv.lokr_w2": (3, 2, 3, 3),
    "lora_unet_norm.w_norm": (6,),
    "lora_unet_double_blocks_0_img_attn_qkv.diff": (7, 4),
}


def test_a_merge_honours_what_no_low_rank_holds(base: Path, tmp_path: Path) -> None:
    own, adapter = numbers(SHAPES, 0), numbers(ADAPTER, 1)
    save_file(adapter, tmp_path / "one.safetensors")
    merge(base, LoraStack([(load(tmp_path / "one.safetensors"), 0.5)]), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: value.astype(np.float64) for name, value in own.items()}
    up, down = adapter["lora_unet_plain.lora_up.weight"], adapter["lora_unet_plain.lora_down.weight"]
    expected["unet.plain.weight"] += 0.5 * up.astype(np.float64) @ down
    expected["unet.plain.bias"] += 0.5 * adapter["lora_unet_plain.diff_b"]
    w1, w2 = adapter["lora_unet_conv.lokr_w1"], adapter["lora_unet_conv.lokr_w2"]
    expected["unet.conv.weight"] += (
        0.5 * torch.kron(torch.from_numpy(w1)[:, :, None, None], torch.from_numpy(w2)).numpy()
    )
    expected["unet.norm.weight"] += 0.5 * adapter["lora_unet_norm.w_norm"]
    diff = adapter["lora_unet_double_blocks_0_img_attn_qkv.diff"]
    for part, rows in (("to_q", slice(0, 3)), ("to_k", slice(3, 5)), ("to_v", slice(5, 7))):
        expected[f"transformer.transformer_blocks.0.attn.{part}.weight"] += 0.5 * diff[rows]
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(got["unet.untouched.weight"], own["unet.untouched.weight"])


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"lora_unet_nowhere.diff": (2, 2)}, "diff lora_unet_nowhere is none of the base's"),
        ({"lora_unet_plain.diff": (6, 5)}, "diff unet.plain.weight is [6, 5], the base's [6, 4]"),
        ({"lora_unet_untouched.diff_b": (2,)}, "diff_b lora_unet_untouched.bias is none of the base's"),
        ({f"lora_unet_double_blocks_0_img_attn_qkv.lokr_w{n}": (1 + 6 * (n < 2), 2) for n in (1, 2)},
         "lokr lora_unet_double_blocks_0_img_attn_qkv is at several weights of the base"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(base: Path, tmp_path: Path, shapes: dict[str, Any], said: str) -> None:
    save_file(numbers(shapes, 1), tmp_path / "one.safetensors")
    with pytest.raises((NamingError, LoraStackError)) as caught:
        merge(base, LoraStack([load(tmp_path / "one.safetensors")]), tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_cut_product_goes_where_a_full_one_cannot(base: Path, tmp_path: Path) -> None:
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    adapter = numbers({f"{module}.lokr_w1": (7, 2), f"{module}.lokr_w2": (1, 2)}, 1)
    save_file(adapter, tmp_path / "one.safetensors")
    lora = load(tmp_path / "one.safetensors", rank=4)
    merge(base, LoraStack([lora]), tmp_path / "out")
    got, own = load_file(tmp_path / "out" / "model.safetensors"), numbers(SHAPES, 0)
    whole = np.kron(adapter[f"{module}.lokr_w1"], adapter[f"{module}.lokr_w2"])
    name = "transformer.transformer_blocks.0.attn.to_k.weight"
    np.testing.assert_allclose(got[name], own[name] + whole[3:5], atol=1e-5)


def test_live_use_refuses_them_by_name(tmp_path: Path) -> None:
    save_file(numbers(ADAPTER, 1), tmp_path / "one.safetensors")
    model = torch.nn.ModuleDict({"plain": torch.nn.Linear(4, 6), "conv": torch.nn.Conv2d(4, 6, 3)})
    with pytest.raises(UnsupportedError) as caught:
        attach(model, LoraStack([load(tmp_path / "one.safetensors")]))
    for said in ("a Kronecker product of two full factors", "a full difference of a weight", "a difference of a bias"):
        assert said in str(caught.value)
