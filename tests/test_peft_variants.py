"""PEFT's variants of LoRA that are ordinary updates once trained, against PEFT's own passes and merges."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from torch import nn

from lorastack import load
from lorastack.errors import FormatError
from lorastack.torch import attach

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(12, 24), "down_proj": nn.Linear(24, 12)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down_proj"](torch.relu(layer["up_proj"](x)))  # type: ignore[operator, index]
        return x


def both_ways(**blocks: Any) -> dict[str, Any]:
    return {"use_bdlora": BdLoraConfig(**blocks)}


VARIANTS: dict[str, dict[str, Any]] = {
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "velora-random": {"velora_config": VeloraConfig(num_groups=5, init_type="random")},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3)},
    "bd-a": both_ways(target_modules_bd_a=["up", "down_proj"], nblocks=2),
    "bd-b": both_ways(target_modules_bd_b=["up_proj", "down"], nblocks=4),
    "bd-both": both_ways(target_modules_bd_a=["up_proj"], target_modules_bd_b=["down_proj"], nblocks=2),
    "bd-some": both_ways(target_modules_bd_b=["down_proj"], nblocks=4, match_strict=False),
    "bd-rslora": {**both_ways(target_modules_bd_a=["up"], nblocks=2, match_strict=False), "use_rslora": True},
    "bd-ranks": {
        **both_ways(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2),
        "rank_pattern": {"up_proj": 6},
    },
}


def trained(variant: dict[str, Any], folder: Path) -> tuple[Net, nn.Module]:
    """A net, and PEFT's model of it, some steps into its training and saved."""
    torch.manual_seed(0)
    base = Net()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **variant))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(7, 12)) - 1).square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return base, model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_does_what_peft_computes_and_merges(name: str, tmp_path: Path) -> None:
    base, model = trained(VARIANTS[name], tmp_path / "trained")
    lora, x = load(tmp_path / "trained"), torch.randn(5, 12)
    expected, before = model(x).detach(), base(x).detach()
    assert (expected - before).abs().max() > 1e-2

    for adapter in (lora, load(lora.save(tmp_path / "again"))):  # and what is saved is an ordinary adapter
        live = copy.deepcopy(base)
        with attach(live, adapter), torch.no_grad():
            torch.testing.assert_close(live(x), expected, atol=1e-5, rtol=0)

    merged = dict(model.merge_and_unload().named_parameters())  # type: ignore[operator]
    for weight, value in base.named_parameters():
        if weight.endswith(".weight"):
            delta = (merged[weight].double() - value.double()).detach().numpy()
            np.testing.assert_allclose(lora.adapters[weight].dense(), delta, atol=1e-6)


@pytest.mark.parametrize(
    "said",
    [
        True,
        {"nblocks": 0},
        {"nblocks": 10**9, "target_modules_bd_a": ["up_proj"]},
        {"nblocks": 2, "target_modules_bd_a": "up_proj"},
        {"nblocks": 2, "target_modules_bd_b": [3]},
        {"nblocks": 2.0},
    ],
    ids=str,
)
def test_blocks_that_make_no_sense_are_refused_by_name(said: Any, tmp_path: Path) -> None:
    trained(VARIANTS["bd-a"], tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_bdlora": said}))
    with pytest.raises(FormatError, match=r"use_bdlora is .*, expected target_modules_bd_a .* at most 256"):
        load(tmp_path)


def test_blocks_that_do_not_fit_the_factors_are_refused(tmp_path: Path) -> None:
    trained(VARIANTS["bd-both"], tmp_path)
    config = tmp_path / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"use_bdlora": said["use_bdlora"] | {"nblocks": 8}}))
    with pytest.raises(FormatError, match=r"down_proj: lora_A is \(4, 24\) and lora_B is .*: rank 4 against"):
        load(tmp_path)
