"""Models inside wrappers - compiled, parallel, PEFT's, offloaded - get what the plain model gets."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from lorastack.errors import UnsupportedError
from lorastack.torch import attach
from tests.torch.families import adapter_for, linear_weights, logits, made
from tests.torch.tiny import far, tokens


def blocks(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)


def one_block_compiled(model: nn.Module) -> nn.Module:
    layers = blocks(model)
    layers[0] = torch.compile(layers[0], backend="eager")
    return model


def named_inside(model: nn.Module, name: str) -> nn.Module:
    """A block inside another module, as sharding and activation checkpointing wrap it."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(name, inner)

        def __getattr__(self, attribute: str) -> Any:
            try:
                return super().__getattr__(attribute)
            except AttributeError:
                return getattr(super().__getattr__(name), attribute)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._modules[name](*args, **kwargs)

    layers = blocks(model)
    layers[0] = Wrapper(layers[0])
    return model


def with_an_idle_peft_adapter(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))  # B is zero: changes nothing


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled block": one_block_compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "PEFT": with_an_idle_peft_adapter,
    "FSDP's block": lambda model: named_inside(model, "_fsdp_wrapped_module"),
    "a checkpointed block": lambda model: named_inside(model, "_checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_wrapped_model_gets_what_the_plain_one_gets(family: str, how: str) -> None:
    torch._dynamo.reset()
    model = made(family)
    lora = adapter_for(linear_weights(model, "q_proj"))
    base = logits(model)
    with attach(model, lora):
        expected = logits(model)
    wrapped = WRAPPED[how](copy.deepcopy(model))
    with attach(wrapped, lora) as handle:
        assert handle.report.matched["made"] == list(lora.adapters)
        assert far(logits(wrapped), expected) < 1e-6
    assert far(logits(wrapped), base) < 1e-6
    assert far(expected, base) > 1e-3


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_layers_that_accelerate_offloads_get_theirs_where_they_are_executed(family: str, where: str, tmp_path) -> None:
    model = made(family)
    lora = adapter_for(linear_weights(model, "q_proj"))
    with attach(model, lora):
        expected = logits(model)
    base = logits(model)
    offloaded = copy.deepcopy(model)
    if where == "cpu":
        cpu_offload(offloaded, torch.device("cpu"))
    else:
        disk_offload(offloaded, str(tmp_path), torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    with attach(offloaded, lora):
        assert far(logits(offloaded), expected) < 1e-6
    assert torch.equal(logits(offloaded), base)


def test_a_model_without_its_weights_is_refused() -> None:
    with torch.device("meta"):
        model = made("qwen2")
    with pytest.raises(UnsupportedError, match="is on the meta device; load the model's weights first"):
        attach(model, adapter_for(linear_weights(model, "q_proj")))


def test_a_saved_head_of_a_wrapped_model_stands_where_it_did() -> None:
    from dataclasses import replace

    import numpy as np

    from lorastack.core.factor import Factor

    model = made("qwen2")
    rng = np.random.default_rng(0)
    head = Factor.of(rng.standard_normal((64, 32)).astype(np.float32), "head")
    lora = replace(adapter_for(linear_weights(model, "q_proj")), extras={"modules_to_save": {"lm_head.weight": head}})
    with attach(model, lora):
        expected = logits(model)
    wrapped = nn.DataParallel(model)
    with attach(wrapped, lora), torch.no_grad():
        assert torch.equal(wrapped(input_ids=tokens()).logits, expected)
    assert isinstance(model.lm_head, nn.Linear)
    assert not torch.equal(logits(model), expected)
