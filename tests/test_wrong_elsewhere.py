"""Wrong answers of today's tools, beside ours on the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorastack import LoraStack, load


@pytest.mark.slow
@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_peft_adds_two_rslora_adapters_wrongly(tmp_path: Path, combination: str) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    if peft.__version__ != "0.21.2":
        pytest.skip("what is held here is PEFT 0.21.2's answer")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)), config, "one")
    model.add_adapter("two", config)
    model.save_pretrained(str(tmp_path))
    layer = model.base_model.model[0]
    exact = sum(0.5 * layer.get_delta_weight(name) for name in ("one", "two")).detach().double().numpy()

    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type=combination)
    theirs = layer.get_delta_weight("sum").detach().double().numpy()
    assert np.linalg.norm(theirs - exact) > 0.5 * np.linalg.norm(exact)
    if combination == "cat":  # the scaling that it writes is sqrt(16), the alpha of the sum being its rank
        np.testing.assert_allclose(np.linalg.norm(theirs) / np.linalg.norm(exact), 4, rtol=0.01)

    stack = LoraStack([(load(tmp_path / name), 0.5) for name in ("one", "two")])
    ((_, delta),) = LoraStack([stack.bake()]).terms(next(iter(stack.weights)))
    np.testing.assert_allclose(delta.scaling * np.float64(delta.b) @ np.float64(delta.a), exact, atol=1e-5)
