"""MLX adapters, against the logits that the real mlx-lm computed with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from lorastack import LoraStack, load, save
from lorastack.base import open_base
from lorastack.base.fit import misfits
from lorastack.base.settle import settle
from lorastack.errors import FormatError
from lorastack.torch import attach

FILES = Path(__file__).parents[1] / "fixtures" / "mlx"
CASES = ["lora", "embedding", "dora", "experts"]


def model_of(case: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(FILES / case / "base", dtype=torch.float32).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_mlx(case: str) -> None:
    said = np.load(FILES / case / "logits.npz")
    model, tokens = model_of(case), torch.from_numpy(said["tokens"].astype(np.int64))
    lora = load(FILES / case / "adapter")
    assert lora.naming == "hf"
    assert lora.metadata["base_model_name_or_path"] == "tiny"
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens).logits.numpy(), said["plain"], atol=1e-5)
        with attach(model, LoraStack([lora])):
            got = model(tokens).logits.numpy()
    np.testing.assert_allclose(got, said["logits"], atol=3e-5)
    assert np.abs(said["logits"] - said["plain"]).max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_it_fits_the_base_and_is_written_as_it_was(tmp_path: Path, case: str) -> None:
    lora = load(FILES / case / "adapter")
    assert misfits(lora, open_base(FILES / case / "base")) == []
    path = save(lora, tmp_path / "again", format="mlx")
    one, other = (load_file(folder / "adapters.safetensors") for folder in (FILES / case / "adapter", path))
    assert set(one) == set(other)
    for key, array in one.items():
        np.testing.assert_array_equal(array, other[key], err_msg=key)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (FILES / case / "adapter", path)]
    for field in ("fine_tune_type", "model"):
        assert configs[0][field] == configs[1][field]
    assert configs[0]["lora_parameters"]["scale"] == configs[1]["lora_parameters"]["scale"]
    assert sorted(configs[0]["lora_parameters"]["keys"]) == configs[1]["lora_parameters"]["keys"]


def test_experts_become_the_parameter_that_todays_model_has() -> None:
    base = open_base(FILES / "experts" / "base")
    own = settle(load(FILES / "experts" / "adapter"), base)
    kinds = {delta.kind for name, delta in own.adapters.items() if ".experts" in name}
    assert kinds == {"experts"} or all(name in base.shapes for name in own.adapters)


def test_an_adapter_of_peft_goes_to_mlx_with_ranks_and_scalings_that_differ(tmp_path: Path) -> None:
    from lorastack import LoadedLora
    from lorastack.core.delta import LoraDelta

    rng = np.random.default_rng(0)
    deltas = {
        f"model.layers.{n}.self_attn.q_proj.weight": LoraDelta(rng.normal(size=(r, 6)), rng.normal(size=(4, r)), s)
        for n, (r, s) in enumerate([(1, 0.5), (3, 2.0), (2, -1.0)])
    }
    back = load(save(LoadedLora.from_tensors(deltas, naming="hf"), tmp_path / "x", format="mlx", dtype="f32"))
    assert {delta.rank for delta in back.adapters.values()} == {3}
    for name, delta in deltas.items():
        np.testing.assert_allclose(back.adapters[name].dense(), delta.dense(), rtol=1e-5, atol=1e-6)


BROKEN = {
    "scale": ({"lora_parameters": {"rank": 3}}, {}, "lora_parameters has scale None"),
    "infinite": ({"lora_parameters": {"scale": 1e39}}, {}, "expected a finite number"),
    "full": ({"fine_tune_type": "full"}, {}, "it is whole weights, no adapter"),
    "no magnitudes": ({"fine_tune_type": "dora"}, {}, "it has no DoRA magnitudes"),
    "half": ({}, {"model.layers.0.self_attn.q_proj.lora_b": None}, "has no lora_b"),
    "foreign": ({}, {"model.norm.weight": np.ones(3, np.float32)}, "tensor model.norm.weight is no part"),
    "shape": ({}, {"model.layers.0.self_attn.q_proj.lora_b": np.ones((4, 2), np.float32)}, "they do not fit"),
    "type": (
        {},
        {"model.layers.0.self_attn.q_proj.lora_b": np.ones((3, 2), np.int32)},
        "is I32, expected a float type",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    config, tensors, said = BROKEN[case]
    folder = tmp_path / "x"
    shutil.copytree(FILES / "lora" / "adapter", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | config))
    state = load_file(folder / "adapters.safetensors") | tensors
    save_file({key: value for key, value in state.items() if value is not None}, folder / "adapters.safetensors")
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert said in str(caught.value)


def test_an_older_configuration_says_dora_with_a_field_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(FILES / "dora" / "adapter", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    del raw["fine_tune_type"]
    (folder / "adapter_config.json").write_text(json.dumps(raw | {"use_dora": True}))
    assert set(load(folder).extras) == {"dora"}
    assert load(folder / "adapters.safetensors").name == "adapters"
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(FormatError, match=r"but no adapters\.safetensors"):
        load(folder)
