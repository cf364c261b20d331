"""An attached stack against the real PEFT, architecture by architecture, feature by feature."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorastack import LoadedLora, LoraStack
from lorastack.torch import attach
from tests.torch.tiny import ARCHITECTURES, far, make_model, output, save_adapter, set_scales

TOLERANCE = 1e-5


def features(name: str) -> dict[str, dict[str, Any]]:
    """Feature -> what its LoraConfig says, for one architecture."""
    _, targets, _, embedding, saved = ARCHITECTURES[name]
    first = targets[0]
    said: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora and patterns": {"use_rslora": True, "rank_pattern": {first: 6}, "alpha_pattern": {targets[-1]: 11}},
        "lora_bias": {"lora_bias": True},
        "bias all": {"bias": "all"},
        "bias lora_only": {"bias": "lora_only"},
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": [saved], "target_modules": [t for t in targets if t != saved]},
    }
    if embedding:
        said["embedding"] = {"target_modules": [*targets, embedding]}
        said["new tokens"] = {"trainable_token_indices": {embedding: [3, 9, 60]}}
    if name != "convnet":
        said["some layers"] = {"layers_to_transform": [1]}
    if name in ("t5", "whisper", "convnet"):
        said.pop("some layers", None)
    if name == "t5":  # PEFT ties tokens of T5's shared embedding to its two stacks in its own way
        said.pop("new tokens")
    return said


CASES = [(name, feature) for name in ARCHITECTURES for feature in features(name)]


@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_one_adapter_gives_pefts_output(name: str, feature: str, tmp_path: Path) -> None:
    model = make_model(name)
    base = output(model, name)
    config = {"target_modules": ARCHITECTURES[name][1]} | features(name)[feature]
    folder = save_adapter(model, tmp_path / "a", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    expected = output(peft, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with attach(model, LoadedLora.load(folder)):
        found = output(model, name)
    assert far(found, expected) < TOLERANCE
    assert far(base, expected) > 100 * TOLERANCE  # the adapter matters, so that the line above can fail
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(output(model, name), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weighted_stacks_give_pefts_output(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    targets = ARCHITECTURES[name][1]
    configs = [{"target_modules": targets, "r": 3}, {"target_modules": targets[:1], "r": 5, "use_rslora": True}]
    folders = [save_adapter(model, tmp_path / f"a{n}", seed=n, **config) for n, config in enumerate(configs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(folders[0]), adapter_name="a0")
        peft.load_adapter(str(folders[1]), adapter_name="a1")
    set_scales(peft, {"a0": 0.7, "a1": -0.4})
    expected = output(peft.eval(), name)
    stack = LoraStack([(LoadedLora.load(folders[0]), 0.7), (LoadedLora.load(folders[1]), -0.4)])
    with attach(model, stack) as handle:
        assert far(output(model, name), expected) < TOLERANCE
        handle.set_scales({"a0": 0.0, "a1": 0.0})
        nothing = output(model, name)
    assert torch.equal(nothing, output(model, name))


@pytest.mark.parametrize("order", [("dora", "plain"), ("plain", "dora"), ("dora", "other")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet"])
def test_dora_stacks_act_in_pefts_order(name: str, order: tuple[str, str], tmp_path: Path) -> None:
    model = make_model(name)
    targets = ARCHITECTURES[name][1]
    for n, kind in enumerate(("dora", "plain", "other")):
        save_adapter(model, tmp_path / kind, seed=n, target_modules=targets, use_dora=kind != "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / order[0]), adapter_name=order[0])
        peft.load_adapter(str(tmp_path / order[1]), adapter_name=order[1])
        peft.base_model.set_adapter(list(order))
    expected = output(peft.eval(), name)
    with attach(model, LoraStack([(LoadedLora.load(tmp_path / kind), 1.0) for kind in order])) as handle:
        assert far(output(model, name), expected) < TOLERANCE
        handle.set_scales(dict.fromkeys(order, 0.0))
        at_zero = output(model, name)
    assert torch.equal(at_zero, output(model, name))
