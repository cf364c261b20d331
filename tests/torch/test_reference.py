"""Attached stacks against what llama.cpp and PEFT wrote down, on real adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorastack import LoadedLora, LoraStack
from lorastack.torch import attach
from tests.models import cases, load_model, logits


@pytest.mark.parametrize(("program", "kind", "ending"), [("llama_cpp", "gguf", ".gguf"), ("peft", "adapters", "")])
def test_stories_give_the_reference_logits(shared: Path, program: str, kind: str, ending: str) -> None:
    folder = shared / "stories260k"
    model = load_model(folder / "base")
    compared = 0
    for key, words, tokens, expected in cases(folder, program):
        if not words:
            continue
        stack = LoraStack([(LoadedLora.load(folder / kind / (name + ending)), scale) for name, scale in words])
        tolerance = 2e-2 if any(".f16" in name for name, _ in words) else 1e-4
        with attach(model, stack):
            np.testing.assert_allclose(logits(model, tokens), expected, atol=tolerance, rtol=0, err_msg=key)
        compared += 1
    assert compared == 18


def test_gguf_cases_give_llama_cpps_logits_token_embedding_included(shared: Path) -> None:
    folder = shared / "gguf_cases"
    arrays = np.load(folder / "logits_llama_cpp.npz")
    compared = []
    for case in json.loads((folder / "logits_llama_cpp.json").read_text()):
        if not case["stack"] or "moe" in case["base"]:
            continue
        model = load_model(folder / case["base"])
        names = [name for name, _ in case["stack"]]
        atol = 0.2 if "q8_0" in case["base"] else 2e-2 if "lora_b.gguf" in names else 1e-4
        with attach(model, LoraStack([(LoadedLora.load(folder / name), scale) for name, scale in case["stack"]])):
            found = logits(model, case["tokens"])
        np.testing.assert_allclose(found, arrays[case["key"]], atol=atol, rtol=0, err_msg=str(case))
        compared.append(case["key"])
    assert compared == ["1", "2", "3", "4", "5", "6", "10"]


class Mlp(nn.Module):
    """The base of PEFT's own regression adapters (tests/regression there)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.lin1 = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.relu(self.lin0(x.float()))).log_softmax(-1)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.relu, self.lin0 = nn.Conv2d(5, 10, 3), nn.ReLU(), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu(self.conv2d(x.float().reshape(2, 5, 3, 3)))
        return self.lin0(h.flatten(1)).log_softmax(-1)


class Emb(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.relu = nn.Embedding(100, 5), Conv1D(1, 5), nn.ReLU()
        self.flat, self.lin0 = nn.Flatten(), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1d(self.emb(x))
        return self.lin0(self.flat(self.relu(h))).log_softmax(-1)


@pytest.mark.parametrize(
    ("folder", "make"),
    [
        ("peftreg-lora_mlp", Mlp),
        ("peftreg-lora_mlp_modules_to_save", Mlp),
        ("peftreg-lora_conv2d", Conv),
        ("peftreg-lora_emb_conv1d", Emb),
    ],
)
def test_pefts_regression_adapters_give_their_output(shared: Path, folder: str, make: type[nn.Module]) -> None:
    path = shared / "peft" / folder
    model = make().eval()
    model.load_state_dict(load_file(path / "derived_base_seed0.safetensors"))
    said = load_file(path / "derived_io.safetensors")
    x = said["input"]
    expected = torch.load(path / "output.pt", map_location="cpu", weights_only=True)
    with torch.no_grad(), attach(model, LoadedLora.load(path)):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert (model(x) - expected).abs().max() > 1e-3
