"""Stacks on the demo model against the logits that llama.cpp and PEFT wrote down: a clone alone tests both.

tests/fixtures/make_logits.py runs the two programs; nothing of them is needed here.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lorastack import LoadedLora, LoraStack, convert_names, load
from tests.fixtures.make_logits import HERE, LLAMA_CPP, PEFT, PROMPTS, make_adapters
from tests.models import load_model, logits, numpy_stack

SAID = json.loads((HERE / "logits.json").read_text())
KEPT = np.load(HERE / "logits.npz")
#: llama.cpp rounds activations too where factors are quantised.
TOLERANCE = {"f32": 1e-4, "f16": 2e-2, "q8_0": 0.2}
COARSEST = ["f32", "f16", "q8_0"]


def coarsest(stack: list[list]) -> str:
    return max((kind for _, kind, _ in stack), key=COARSEST.index, default="f32")


@pytest.fixture(scope="module")
def made(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(demo, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def model(demo: Path) -> torch.nn.Module:
    return load_model(demo / "base")


def assert_gives(model: torch.nn.Module, stacks: list[LoraStack], program: str, n: int, atol: float) -> None:
    for p, tokens in enumerate(SAID["prompts"]):
        with contextlib.ExitStack() as open_:
            for stack in stacks:
                open_.enter_context(numpy_stack(model, stack))
            found = logits(model, tokens)[-SAID["kept"] :]
        np.testing.assert_allclose(found, KEPT[f"{program}_s{n}_p{p}"], atol=atol, rtol=0, err_msg=f"prompt {p}")


def test_what_was_run_is_what_the_script_runs() -> None:
    assert SAID["prompts"] == PROMPTS
    assert SAID["llama_cpp"] == [[list(entry) for entry in stack] for stack in LLAMA_CPP]
    assert SAID["peft"] == [[list(entry) for entry in stack] for stack in PEFT]
    assert len(KEPT.files) == len(PROMPTS) * (len(LLAMA_CPP) + len(PEFT))
    assert sum((HERE / f"logits.{ending}").stat().st_size for ending in ("npz", "json")) < 300_000


@pytest.mark.parametrize("n", range(len(LLAMA_CPP)), ids=lambda n: "+".join("".join(map(str, e)) for e in LLAMA_CPP[n]))
def test_gguf_stacks_give_llama_cpps_logits(model: torch.nn.Module, made: dict[str, Path], n: int) -> None:
    stack = SAID["llama_cpp"][n]
    lora_stack = LoraStack([(load(made[f"{name}.{kind}"]), scale) for name, kind, scale in stack])
    assert_gives(model, [lora_stack] if stack else [], "llama_cpp", n, TOLERANCE[coarsest(stack)])


@pytest.mark.parametrize("n", range(len(PEFT)), ids=lambda n: "+".join("".join(map(str, e)) for e in PEFT[n]))
def test_peft_stacks_give_pefts_logits(model: torch.nn.Module, made: dict[str, Path], n: int) -> None:
    assert_gives(model, [LoraStack([(load(made[name]), scale) for name, scale in SAID["peft"][n]])], "peft", n, 1e-4)


@pytest.mark.parametrize("n", range(1, len(LLAMA_CPP)))
def test_baked_to_gguf_the_originals_give_llama_cpps_logits(
    model: torch.nn.Module, made: dict[str, Path], demo: Path, tmp_path: Path, n: int
) -> None:
    stack = SAID["llama_cpp"][n]
    lora_stack = LoraStack()
    for name, _, scale in stack:
        original = load(made.get(name, made["excited.f32"]))
        lora_stack.push(convert_names(original, str(demo / "base.gguf"), "gguf"), scale)
    kind = coarsest(stack)
    baked = load(lora_stack.bake(base=demo / "base.gguf").save(tmp_path / "baked.gguf", dtype=kind))
    assert_gives(model, [LoraStack([(baked, 1.0)])], "llama_cpp", n, TOLERANCE[kind])


@pytest.mark.parametrize("n", range(len(PEFT)))
def test_baked_to_a_folder_they_give_pefts_logits(
    model: torch.nn.Module, made: dict[str, Path], tmp_path: Path, n: int
) -> None:
    stack = LoraStack([(load(made[name]), scale) for name, scale in SAID["peft"][n]])
    baked = load(stack.bake().save(tmp_path / "baked"))
    assert_gives(model, [LoraStack([(baked, 1.0)])], "peft", n, 1e-4)


@pytest.mark.parametrize("name", ["luna", "robot", "patterned"])
def test_names_convert_as_the_script_converts_them_without_us(made: dict[str, Path], demo: Path, name: str) -> None:
    there, expected = convert_names(load(made[name]), str(demo / "base")), load(made[f"{name}.f32"])
    assert sorted(there.adapters) == sorted(expected.adapters)
    for weight, delta in expected.adapters.items():
        found = there.adapters[weight]
        np.testing.assert_array_equal(found.a, delta.a)
        np.testing.assert_allclose(found.b * found.scaling, delta.b * delta.scaling, rtol=3e-7)


def test_every_adapter_matters(model: torch.nn.Module, made: dict[str, Path]) -> None:
    def moved(lora: LoadedLora) -> float:
        with numpy_stack(model, LoraStack([(lora, 1.0)])):
            return float(np.abs(logits(model, PROMPTS[0]) - plain).max())

    plain = logits(model, PROMPTS[0])
    for name in ("luna", "robot", "patterned", "excited.f32"):
        by = moved(load(made[name]))
        assert by > 1, f"{name} moves logits by {by} only: a wrong scaling might go unseen"
