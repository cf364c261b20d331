"""The stack against what llama.cpp and PEFT themselves computed, on real adapters and a real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack
from tests.models import cases, load_model, logits, numpy_stack


def tolerance(stack: list[tuple[str, float]]) -> float:
    return 2e-2 if any(".f16" in name or name == "lora_b.gguf" for name, _ in stack) else 1e-4


def test_gguf_stacks_give_llama_cpps_logits(shared: Path) -> None:
    folder = shared / "stories260k"
    model = load_model(folder / "base")
    compared = 0
    for key, words, tokens, expected in cases(folder, "llama_cpp"):
        stack = LoraStack([(LoadedLora.load(folder / "gguf" / f"{name}.gguf"), scale) for name, scale in words])
        with numpy_stack(model, stack):
            np.testing.assert_allclose(logits(model, tokens), expected, atol=tolerance(words), rtol=0, err_msg=key)
        compared += 1
    assert compared == 21


def test_peft_stacks_give_pefts_logits(shared: Path) -> None:
    folder = shared / "stories260k"
    model = load_model(folder / "base")
    compared = 0
    for key, words, tokens, expected in cases(folder, "peft"):
        if any("dora" in name for name, _ in words):
            continue
        stack = LoraStack([(LoadedLora.load(folder / "adapters" / name), scale) for name, scale in words])
        with numpy_stack(model, stack):
            np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4, rtol=0, err_msg=key)
        compared += 1
    assert compared == 18


def test_gguf_cases_give_llama_cpps_logits(shared: Path) -> None:
    folder = shared / "gguf_cases"
    arrays = np.load(folder / "logits_llama_cpp.npz")
    compared = []
    for case in json.loads((folder / "logits_llama_cpp.json").read_text()):
        names = [name for name, _ in case["stack"]]
        if case["base"] == "base_moe.gguf" or "lora_embd.gguf" in names:
            continue  # not linear layers: see the tests of lorastack.torch
        model = load_model(folder / case["base"])
        stack = LoraStack([(LoadedLora.load(folder / name), scale) for name, scale in case["stack"]])
        atol = 0.2 if case["base"] == "base_q8_0.gguf" else tolerance(case["stack"])
        with numpy_stack(model, stack):
            np.testing.assert_allclose(
                logits(model, case["tokens"]), arrays[case["key"]], atol=atol, rtol=0, err_msg=str(case)
            )
        compared.append(case["key"])
    assert compared == ["0", "1", "2", "3", "5", "6", "9", "10"]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_stack_matters_and_scale_zero_is_the_base(shared: Path, scale: float) -> None:
    folder = shared / "stories260k"
    model = load_model(folder / "base")
    tokens = [1, 403, 407, 261]
    base = logits(model, tokens)
    with numpy_stack(model, LoraStack([(LoadedLora.load(folder / "gguf/zara.f32.gguf"), scale)])):
        moved = np.abs(logits(model, tokens) - base).max()
    assert moved == 0 if scale == 0 else moved > 1
