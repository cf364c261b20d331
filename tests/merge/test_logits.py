"""Merged real models in transformers, against what llama.cpp and PEFT wrote down of the adapters live."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoraStack, load, merge
from tests.fixtures.make_logits import make_adapters
from tests.models import cases, load_model, logits
from tests.test_demo_logits import KEPT, SAID


def test_merged_stories_give_pefts_live_logits(shared: Path, tmp_path: Path) -> None:
    folder = shared / "stories260k"
    models: dict[str, object] = {}
    for key, words, tokens, expected in cases(folder, "peft"):
        said = json.dumps(words)
        if said not in models:
            out = tmp_path / str(len(models))
            stack = LoraStack([(load(folder / "adapters" / name), scale) for name, scale in words])
            merge(folder / "base", stack, out) if len(stack) else None
            models[said] = load_model(out if len(stack) else folder / "base")
        np.testing.assert_allclose(logits(models[said], tokens), expected, atol=1e-4, rtol=0, err_msg=key)  # type: ignore[arg-type]
    assert len(models) >= 6


@pytest.fixture(scope="module")
def made(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(demo, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("n", [n for n, stack in enumerate(SAID["peft"]) if stack])
def test_the_merged_demo_gives_pefts_live_logits(made: dict[str, Path], demo: Path, tmp_path: Path, n: int) -> None:
    stack = LoraStack([(load(made[name]), scale) for name, scale in SAID["peft"][n]])
    merge(demo / "base", stack, tmp_path / "out", verify=True)
    model = load_model(tmp_path / "out")
    for p, tokens in enumerate(SAID["prompts"]):
        found = logits(model, tokens)[-SAID["kept"] :]
        np.testing.assert_allclose(found, KEPT[f"peft_s{n}_p{p}"], atol=1e-4, rtol=0, err_msg=f"prompt {p}")


@pytest.mark.parametrize("folder", [True, False])
def test_the_merged_demo_gives_llama_cpps_live_logits(
    made: dict[str, Path], demo: Path, tmp_path: Path, folder: bool
) -> None:
    plain = [n for n, stack in enumerate(SAID["llama_cpp"]) if stack and all(kind == "f32" for _, kind, _ in stack)]
    assert plain
    for n in plain:
        stack = LoraStack([(load(made[f"{name}.{kind}"]), scale) for name, kind, scale in SAID["llama_cpp"][n]])
        out = tmp_path / (f"{n}" if folder else f"{n}.gguf")
        merge(demo / ("base" if folder else "base.gguf"), stack, out)
        model = load_model(out)
        for p, tokens in enumerate(SAID["prompts"]):
            found = logits(model, tokens)[-SAID["kept"] :]
            np.testing.assert_allclose(found, KEPT[f"llama_cpp_s{n}_p{p}"], atol=1e-4, rtol=0, err_msg=f"{n}, {p}")
