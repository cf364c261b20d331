"""Wrong answers of today's tools, beside ours on the same files: ours is the float64 sum, theirs off by a known factor.

The programs are the pinned ones of the tests' environment. kohya's scripts are no package: name a checkout of
kohya-ss/sd-scripts in LORASTACK_SD_SCRIPTS.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lorastack import LoraStack, convert, load
from tests.conftest import lacking

pytestmark = pytest.mark.slow
RANK = 4


def sum_of(*adapters: tuple[Path, float]) -> NDArray[np.float64]:
    """The one update of what we bake of some adapters, in float64."""
    baked = LoraStack([(load(path), scale) for path, scale in adapters]).bake()
    (delta,) = baked.adapters.values()
    return delta.scaling * np.asarray(delta.b, np.float64) @ np.asarray(delta.a, np.float64)


def norm(update: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(update))


@pytest.fixture(scope="module")
def peft() -> Any:
    """The pinned PEFT."""
    found = pytest.importorskip("peft")
    if found.__version__ != "0.21.2":
        lacking(f"what is held here are the answers of PEFT 0.21.2, and {found.__version__} is installed")
    return found


class Trained:
    """Adapters ``one`` and ``two`` of PEFT on one layer, saved in a folder; half of each, added, in float64."""

    def __init__(self, peft: Any, folder: Path, rslora: bool) -> None:
        import torch

        torch.manual_seed(0)
        given = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, use_rslora=rslora, target_modules=["0"], init_lora_weights=False
        )
        self.model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)), given, "one")
        self.model.add_adapter("two", given)
        self.model.save_pretrained(str(folder))
        self.layer = self.model.base_model.model[0]
        self.a = {name: factor.weight.detach().double().numpy() for name, factor in self.layer.lora_A.items()}
        self.b = {name: factor.weight.detach().double().numpy() for name, factor in self.layer.lora_B.items()}
        scaling = RANK / math.sqrt(RANK) if rslora else 1.0
        self.exact = sum(0.5 * scaling * self.b[name] @ self.a[name] for name in ("one", "two"))
        self.ours = sum_of((folder / "one", 0.5), (folder / "two", 0.5))

    def added(self, combination: str) -> NDArray[np.float64]:
        """What PEFT makes of half of each."""
        self.model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type=combination)
        return self.layer.get_delta_weight("sum").detach().double().numpy()


def test_peft_adds_two_rslora_adapters_to_2_83_times_the_norm(peft: Any, tmp_path: Path) -> None:
    """The sum's alpha is its rank, 8, and rsLoRA is carried over: 8 / sqrt(8), where the factors hold all already."""
    trained = Trained(peft, tmp_path, rslora=True)
    theirs = trained.added("cat")
    np.testing.assert_allclose(theirs, math.sqrt(2 * RANK) * trained.exact, atol=1e-5)
    np.testing.assert_allclose(norm(theirs) / norm(trained.exact), 2.83, atol=0.01)
    np.testing.assert_allclose(trained.ours, trained.exact, atol=1e-6)


def test_peft_adds_factors_in_place_of_adapters(peft: Any, tmp_path: Path) -> None:
    """``linear`` has products of one's B and the other's A in it."""
    trained = Trained(peft, tmp_path, rslora=False)
    crossed = 0.5 * (trained.b["one"] @ trained.a["two"] + trained.b["two"] @ trained.a["one"])
    np.testing.assert_allclose(trained.added("linear"), trained.exact + crossed, atol=1e-5)
    assert norm(crossed) > 0.7 * norm(trained.exact)
    np.testing.assert_allclose(trained.ours, trained.exact, atol=1e-6)


def test_llama_cpps_converter_halves_an_rslora_adapter_of_rank_4(
    peft: Any, demo: Path, llama_cpp: object, tmp_path: Path
) -> None:
    """It writes alpha alone, which llama.cpp divides by the rank, not by its root."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.fixtures.make_architectures import fetched
    from tests.fixtures.make_logits import llama_cpp_logits

    try:
        sources = fetched()
    except subprocess.CalledProcessError:
        lacking("the source package of llama-cpp-python, which has the converter, cannot be fetched here")
    torch.manual_seed(0)
    given = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(demo / "base"), given)
    model.save_pretrained(str(tmp_path / "rslora"))
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    words = [sources / "convert_lora_to_gguf.py", "--base", demo / "base", "--outtype", "f32", "--outfile", theirs]
    subprocess.run([sys.executable, *words, tmp_path / "rslora"], check=True, capture_output=True)
    convert(load(tmp_path / "rslora"), ours, base=demo / "base")

    tokens = [1, 403, 407, 261, 378]
    with torch.no_grad():
        exact = model(torch.tensor([tokens])).logits[0].numpy()
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] /= math.sqrt(RANK)
        halved = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(halved - exact).max() > 0.1
    base = demo / "base.gguf"
    np.testing.assert_allclose(llama_cpp_logits(base, [(theirs, 1.0)], tokens), halved, atol=1e-3)
    np.testing.assert_allclose(llama_cpp_logits(base, [(ours, 1.0)], tokens), exact, atol=1e-3)


def merged_by_kohya(files: Sequence[Path], ratios: Sequence[float], concat: bool) -> dict[str, NDArray[np.float64]]:
    """What ``networks/merge_lora.py`` of the checkout makes; only that function is run, its metadata left out."""
    import torch
    from safetensors.torch import load_file

    if not (checkout := os.environ.get("LORASTACK_SD_SCRIPTS")):
        pytest.skip("kohya's scripts are no package: name a checkout of kohya-ss/sd-scripts in LORASTACK_SD_SCRIPTS")
    source = ast.parse((Path(checkout) / "networks" / "merge_lora.py").read_text())
    wanted: list[ast.stmt] = [
        node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "merge_lora_models"
    ]
    names: dict[str, Any] = {
        "torch": torch, "math": math, "logger": logging.getLogger(),
        "load_state_dict": lambda file, dtype: ({key: one.to(dtype) for key, one in load_file(file).items()}, None),
        "train_util": type("NoMetadata", (), {"build_minimum_network_metadata": lambda *_: None}),
    }  # fmt: skip
    exec(compile(ast.Module(wanted, []), "merge_lora.py", "exec"), names)
    found, _, _ = names["merge_lora_models"](files, ratios, torch.float, concat)
    return {key: one.double().numpy() for key, one in found.items()}


@pytest.mark.parametrize("concat", [False, True])
def test_kohyas_merge_ratio_acts_squared(tmp_path: Path, concat: bool) -> None:
    """Both factors are multiplied by it: at 0.5 a quarter is left of the adapter."""
    rng = np.random.default_rng(0)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    a, b = rng.standard_normal((RANK, 16), np.float32), rng.standard_normal((16, RANK), np.float32)
    given = {"lora_up.weight": b, "lora_down.weight": a, "alpha": np.asarray(RANK, np.float32)}
    style = tmp_path / "style.safetensors"
    save_file({f"{module}.{part}": one for part, one in given.items()}, style)
    exact = 0.5 * np.float64(b) @ np.float64(a)
    np.testing.assert_allclose(sum_of((style, 0.5)), exact, atol=1e-5)

    found = merged_by_kohya([style], [0.5], concat)
    up, down, alpha = (found[f"{module}.{part}"] for part in given)
    np.testing.assert_allclose(alpha / len(down) * up @ down, 0.5 * exact, atol=1e-5)
