"""Experts one by one and in one parameter: PEFT's adapters of both, on models that keep them in one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel

from lorastack import LoraStack, convert, load, save
from lorastack.base import open_base
from lorastack.errors import FormatError
from lorastack.torch import attach
from tests.convert.test_round_trips import dense
from tests.torch.test_experts import mixtral, qwen3_moe, run, saved
from tests.torch.tiny import far

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_one_by_one_and_back_they_compute_what_peft_does(make, with_base: bool, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    folder = saved(model, tmp_path / "a", PARAMETERS, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())
    base = open_base(tmp_path / "base") if with_base else None
    single = load(convert(folder, tmp_path / "single", experts="one by one", base=base))
    assert not any(name.endswith("experts.down_proj") for name in single.adapters)
    own = "block_sparse_moe.experts.3.w2" if make is mixtral and with_base else "mlp.experts.3.down_proj"
    assert f"model.layers.1.{own}.weight" in single.adapters
    whole = load(convert(tmp_path / "single", tmp_path / "whole", experts="fused"))
    for lora in (single, whole):
        with attach(model, LoraStack([(lora, 1.0)])):
            assert far(run(model), expected) < 1e-5
    before, after = dense(load(folder)), dense(whole)
    assert {name.replace("block_sparse_moe", "mlp") for name in after} == set(before)


def test_mlx_and_vllm_take_them_one_by_one(tmp_path: Path) -> None:
    model = qwen3_moe()
    folder = saved(model, tmp_path / "a", PARAMETERS, 2)
    expected = run_with(model, folder)
    mlx = convert(folder, tmp_path / "mlx", target="mlx-lm")
    assert torch.equal(run_with(model, mlx), expected) or far(run_with(model, mlx), expected) < 1e-5
    with pytest.raises(FormatError, match="which MLX has no place for"):
        save(load(folder), tmp_path / "other", format="mlx")


def run_with(model: tf.PreTrainedModel, path: Path) -> torch.Tensor:
    with attach(model, load(path)):
        return run(model)
