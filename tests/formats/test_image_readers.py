"""kohya, ComfyUI and diffusers files as they are read, against kohya's formula and diffusers' own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorastack import LoraStack, load
from lorastack.algebra.compare import compare
from lorastack.errors import FormatError, LoraStackError, NonFiniteError, UnsupportedError
from lorastack.formats.modules import PARTS, split
from lorastack.inspect import inspect
from tests.hostile.limits import refused


def pair(
    module: str, rank: int = 2, out: int = 5, wide: int = 7, kernel: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    ones = (1,) * len(kernel)
    return {
        f"{module}.lora_down.weight": torch.randn(rank, wide, *kernel, generator=generator),
        f"{module}.lora_up.weight": torch.randn(out, rank, *ones, generator=generator),
    }


ALPHAS = {
    "none": (None, 1.0),
    "zero": (torch.tensor(0.0), 1.0),
    "half": (torch.tensor(1.0), 0.5),
    "negative": (torch.tensor(-3.0), -1.5),
    "f16": (torch.tensor(8.0, dtype=torch.float16), 4.0),
    "bf16": (torch.tensor(8.0, dtype=torch.bfloat16), 4.0),
    "f64": (torch.tensor(1.0, dtype=torch.float64), 0.5),
    "whole": (torch.tensor(4), 2.0),
    "one element": (torch.tensor([4.0]), 2.0),
}


@pytest.mark.parametrize("case", ALPHAS)
@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)])
def test_the_update_is_kohyas(tmp_path: Path, case: str, kernel: tuple[int, ...]) -> None:
    """networks/lora.py of sd-scripts: ``up @ down * (alpha / dim)``, an alpha of 0 or none is the dim."""
    alpha, scaling = ALPHAS[case]
    state = pair("lora_unet_x", kernel=kernel) | pair("lora_te1_y")
    if alpha is not None:
        state |= {"lora_unet_x.alpha": alpha, "lora_te1_y.alpha": alpha.clone()}
    save_file(state, tmp_path / "one.safetensors")
    for path in (tmp_path, tmp_path / "one.safetensors"):
        lora = load(path)
        assert (lora.naming, lora.name) == ("kohya", "one")
        assert set(lora.adapters) == {"lora_unet_x", "lora_te1_y"}
        down, up = (state[f"lora_unet_x.lora_{part}.weight"].double() for part in ("down", "up"))
        expected = torch.einsum("or,ri->oi", up.reshape(5, 2), down.reshape(2, -1)) * scaling
        np.testing.assert_allclose(lora.adapters["lora_unet_x"].dense().reshape(5, -1), expected, rtol=1e-5, atol=1e-6)


BAD = {
    "nan": (
        {"lora_unet_x.alpha": torch.tensor(float("nan"))},
        "tensor lora_unet_x.alpha is nan, expected a finite number",
    ),
    "inf": ({"lora_unet_x.alpha": torch.tensor(float("inf"))}, "expected a finite number"),
    "huge": ({"lora_unet_x.alpha": torch.tensor(1e300, dtype=torch.float64)}, "is 1e+300, expected a finite"),
    "many": (
        {"lora_unet_x.alpha": torch.ones(1000000, dtype=torch.int8)},
        "is I8 of shape [1000000], expected one number",
    ),
    "bool": ({"lora_unet_x.alpha": torch.tensor(True)}, "is BOOL of shape [], expected one number"),
    "empty": ({"lora_unet_x.alpha": torch.ones(0)}, "expected one number"),
    "no up": ({"lora_unet_x.lora_up.weight": None}, "module lora_unet_x: it has lora_down but no lora_up"),
    "no down": ({"lora_unet_x.lora_down.weight": None}, "module lora_unet_x: it has lora_up but no lora_down"),
    "alpha alone": ({"lora_unet_z.alpha": torch.tensor(1.0)}, "module lora_unet_z has an alpha and nothing else"),
    "rank": ({"lora_unet_x.lora_up.weight": torch.ones(5, 3)}, "rank 2 against 3"),
    "dimensions": ({"lora_unet_x.lora_up.weight": torch.ones(5, 2, 1, 1)}, "linear factors have 2 dimensions each"),
    "whole": ({"lora_unet_x.lora_up.weight": torch.ones(5, 2, dtype=torch.int32)}, "is I32, expected a float type"),
    "no rows": ({"lora_unet_x.lora_up.weight": torch.ones(0, 2)}, "is empty, a dimension is 0"),
    "foreign": ({"bundle_emb.x.string_to_param.*": torch.ones(2, 3)}, "is no part of an update known here"),
    "dora": ({"lora_unet_x.dora_scale": torch.ones(6, 1)}, "its lora_up has 5 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_with_tensor_and_way_out(tmp_path: Path, case: str) -> None:
    changed, said = BAD[case]
    state: dict[str, Any] = pair("lora_unet_x") | pair("lora_te_y") | changed
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "one.safetensors")
    error = refused(tmp_path / "one.safetensors")
    assert said in str(error)
    assert "one.safetensors" in str(error)


def test_every_bad_alpha_is_listed_at_once(tmp_path: Path) -> None:
    state = {}
    for n in range(3):
        state |= pair(f"lora_unet_{n}") | {f"lora_unet_{n}.alpha": torch.tensor(float("nan"))}
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(FormatError) as caught:
        load(tmp_path).adapters["lora_unet_0"].scaling  # noqa: B018
    assert len(caught.value.problems) == 3


def test_nan_in_factors_is_seen_when_they_are_read(tmp_path: Path) -> None:
    state = pair("lora_unet_x")
    state["lora_unet_x.lora_up.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(NonFiniteError, match=r"lora_unet_x\.lora_up\.weight"):
        load(tmp_path).check()
    load(tmp_path, allow_nonfinite=True).check()


def test_work_without_a_base_goes_by_the_files_own_names(tmp_path: Path) -> None:
    for n, name in enumerate("ab"):
        state = pair("lora_unet_x", rank=2 + n) | pair("lora_te_y") | {"lora_unet_x.alpha": torch.tensor(1.0)}
        save_file(state, tmp_path / f"{name}.safetensors", {"ss_network_dim": "2"})
    one, two = (load(tmp_path / f"{name}.safetensors") for name in "ab")
    baked = LoraStack([(one, 0.5), (two, -1.0)]).bake()
    assert baked.naming == "kohya"
    expected = 0.5 * one.adapters["lora_unet_x"].dense() - two.adapters["lora_unet_x"].dense()
    np.testing.assert_allclose(baked.adapters["lora_unet_x"].dense(), expected, rtol=1e-5, atol=1e-6)
    path = baked.save(tmp_path / "out.safetensors")
    np.testing.assert_allclose(load(path).adapters["lora_unet_x"].dense(), expected, rtol=1e-5, atol=1e-6)
    assert compare(LoraStack([one, two])) is not None
    assert inspect(one).weights == 2


def test_extras_of_full_rank_are_not_baked_or_applied(tmp_path: Path) -> None:
    save_file(pair("lora_unet_x") | {"lora_unet_z.diff": torch.ones(3, 3)}, tmp_path / "one.safetensors")
    with pytest.raises(UnsupportedError, match="a full difference of a weight"):
        LoraStack([load(tmp_path)]).bake()


# ---- diffusers ------------------------------------------------------------------------------------

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0"
#: A module's spelling in files of several times -> today's weight.
SPELLINGS = {
    f"unet.{UNET}.to_q.lora_A": f"unet.{UNET}.to_q.weight",
    f"unet.{UNET}.to_q.lora.down": f"unet.{UNET}.to_q.weight",
    f"unet.{UNET}.processor.to_q_lora.down": f"unet.{UNET}.to_q.weight",
    f"unet.{UNET}.processor.to_out_lora.down": f"unet.{UNET}.to_out.0.weight",
    f"{UNET}.processor.to_v_lora.down": f"unet.{UNET}.to_v.weight",
    f"unet.{UNET}.to_out.0.lora.down": f"unet.{UNET}.to_out.0.weight",
    f"text_encoder.{TEXT}.self_attn.to_out_lora.down": f"text_encoder.{TEXT}.self_attn.out_proj.weight",
    f"text_encoder.{TEXT}.self_attn.q_proj.lora_linear_layer.down": f"text_encoder.{TEXT}.self_attn.q_proj.weight",
    f"text_encoder_2.{TEXT}.mlp.fc1.lora_A": f"text_encoder_2.{TEXT}.mlp.fc1.weight",
    "transformer.transformer_blocks.3.attn.to_k.lora_A": "transformer.transformer_blocks.3.attn.to_k.weight",
    "transformer_blocks.3.attn.to_k.lora_A": "transformer.transformer_blocks.3.attn.to_k.weight",
}


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_spelling_of_any_time_is_todays_name(tmp_path: Path, key: str) -> None:
    other = f"{key.removesuffix('.down')}.up" if key.endswith(".down") else key.replace("lora_A", "lora_B")
    state = {f"{key}.weight": torch.randn(2, 7), f"{other}.weight": torch.randn(5, 2)}
    save_file(state, tmp_path / "one.safetensors")
    lora = load(tmp_path)
    assert lora.naming == "hf"
    assert lora.metadata["lorastack.format"] == "diffusers"
    assert {name: delta.scaling for name, delta in lora.adapters.items()} == {SPELLINGS[key]: 1.0}
    if key.startswith("unet."):
        theirs = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in state.items()})
        assert {f"unet.{k.split('.lora_')[0]}.weight" for k in theirs} == set(lora.adapters)


def header(tmp_path: Path, said: Any) -> Path:
    state = {f"unet.{UNET}.to_q.lora_A.weight": torch.ones(2, 7), f"unet.{UNET}.to_q.lora_B.weight": torch.ones(5, 2)}
    text = said if isinstance(said, str) else json.dumps(said)
    save_file(state, tmp_path / "one.safetensors", {"lora_adapter_metadata": text})
    return tmp_path / "one.safetensors"


def test_the_headers_metadata_says_the_scaling(tmp_path: Path) -> None:
    path = header(
        tmp_path, {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.target_modules": ["to_q"]}
    )
    assert next(iter(load(path).adapters.values())).scaling == 6 / 2**0.5
    assert load(path).alpha == 6
    _, _, said = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name="one.safetensors", return_lora_metadata=True
    )
    assert said["unet.lora_alpha"] == 6


HEADERS = {
    "no JSON": ("{", "it is no JSON"),
    "no object": ([], "it is no JSON object"),
    "no component": ({"r": 2}, "has 'r', expected a component's field such as unet.r"),
    "rank": ({"unet.r": 3, "unet.lora_alpha": 3}, "has rank 2, lora_adapter_metadata says 3"),
    "alpha": ({"unet.r": 2, "unet.lora_alpha": "x"}, "lora_alpha is 'x', expected a finite number"),
    "field": ({"unet.r": 2, "unet.lora_alpha": 2, "unet.new_thing": 1}, "new_thing = 1 is a field not known here"),
    "dora": ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}, "is set, but it has no magnitude"),
    "objects": ("[" + "{}," * 3_000_000 + "{}]", "of memory to parse"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_what_is_wrong_in_the_headers_metadata_is_said(tmp_path: Path, case: str) -> None:
    said, expected = HEADERS[case]
    with pytest.raises(FormatError) as caught:
        load(header(tmp_path, said))
    assert expected in str(caught.value)
    if case == "field":
        assert load(tmp_path, ignore=["new_thing"]).num_adapters() == 1


def test_an_alpha_beside_metadata_is_refused(tmp_path: Path) -> None:
    state = pair("unet.x.to_q") | {"unet.x.to_q.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "one.safetensors")
    assert next(iter(load(tmp_path).adapters.values())).scaling == 0.5
    save_file(state, tmp_path / "one.safetensors", {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'})
    with pytest.raises(FormatError, match="which of the two counts is not known"):
        load(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.sampled_from(sorted(PARTS)))
def test_a_key_is_split_at_its_part(module: str, part: str) -> None:
    found, name = split(f"{module}.{part}")
    if not module.endswith(("lora", "lora_linear_layer", "default", "lora_A", "lora_B", "lora_magnitude_vector")):
        assert (found, name) == (module, PARTS[part])


def test_bfloat16_is_read(tmp_path: Path) -> None:
    save_file({key: value.bfloat16() for key, value in pair("lora_unet_x").items()}, tmp_path / "one.safetensors")
    assert load(tmp_path).adapters["lora_unet_x"].a.dtype == ml_dtypes.bfloat16


def test_twins_in_two_spellings_are_refused(tmp_path: Path) -> None:
    state = pair("unet.x.to_q") | {k.replace("to_q.lora", "to_q.lora_linear_layer.").replace("._", "."): v
                                   for k, v in pair("unet.x.to_q").items()}  # fmt: skip
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(LoraStackError, match="are both the down of one module"):
        load(tmp_path)
