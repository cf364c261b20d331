"""Adapters that the real PEFT makes for transformers' own classes, dense and with experts, against PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorastack import load
from lorastack.torch import attach
from tests.torch.architectures import Architecture, architectures, inputs_of, made, targets_of


def outputs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result[0]


def saved(model: nn.Module, folder: Path, **config: Any) -> Any:
    """PEFT's model with an adapter, as it is saved: of some classes PEFT itself does not load all that it wrote."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **config))
        peft.save_pretrained(folder, save_embedding_layers=False)
    return peft.eval()


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def check(one: Architecture, model: nn.Module, peft: Any, folder: Path) -> None:
    inputs = inputs_of(one.family, model)
    base, expected = outputs(model, inputs), outputs(peft, inputs)
    with attach(model, load(folder)):
        found = outputs(model, inputs)
    if not near(found, expected):  # PEFT's layers have no effect where a model reads their weight; merged, they have
        expected = outputs(peft.merge_and_unload().eval(), inputs)
    assert near(found, expected)
    assert not torch.equal(found, base) or torch.equal(expected, base)
    assert torch.equal(outputs(model, inputs), base)


@pytest.mark.parametrize("one", list(architectures(usual=True)), ids=str)
def test_the_usual_architectures_give_pefts_logits(one: Architecture, tmp_path: Path) -> None:
    model = made(one)
    check(one, model, saved(model, tmp_path, **targets_of(one, model)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("one", list(architectures(usual=False)), ids=str)
def test_all_other_architectures_give_pefts_logits(one: Architecture, tmp_path: Path) -> None:
    try:
        model = made(one)
        peft = saved(model, tmp_path, **targets_of(one, model))
        outputs(peft, inputs_of(one.family, model))
    except Exception as error:  # what a class or PEFT asks for beyond sizes
        pytest.skip(f"no tiny model of it: {type(error).__name__}")
    check(one, model, peft, tmp_path)
