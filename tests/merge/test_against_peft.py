"""A merged folder, loaded by transformers, against the live PEFT model and its ``merge_and_unload``."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lorastack import LoraStack, load, merge
from lorastack.errors import UnsupportedError
from lorastack.torch import attach
from tests.torch.test_against_peft import CASES, features
from tests.torch.tiny import ARCHITECTURES, far, make_model, output, save_adapter, set_scales

TOLERANCE = 1e-5
#: PEFT has no such merge: its bias of lora_B needs a base with a bias.
NO_BIAS = ("llama", "qwen3", "mistral", "gemma", "gemma3", "t5", "whisper", "qwen2", "gpt-neox")


def saved_base(model: nn.Module, folder: Path) -> Path:
    """The model as its library saves it."""
    if isinstance(model, tf.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return folder


def loaded(name: str, model: nn.Module, folder: Path) -> nn.Module:
    """The model in a merged folder."""
    if isinstance(model, tf.PreTrainedModel):
        fresh, said = type(model).from_pretrained(folder, output_loading_info=True)
        assert not said["missing_keys"], said
        assert not said["unexpected_keys"], said
        return fresh.eval()
    fresh = make_model(name)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    return fresh.eval()


def peft_model(model: nn.Module, *folders: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(folders[0]), adapter_name=folders[0].name)
        for folder in folders[1:]:
            peft.load_adapter(str(folder), adapter_name=folder.name)
    return peft.eval()


@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_one_adapter_gives_pefts_output(name: str, feature: str, tmp_path: Path) -> None:
    model = make_model(name)
    base = saved_base(model, tmp_path / "base")
    config = {"target_modules": ARCHITECTURES[name][1]} | features(name)[feature]
    adapter = load(save_adapter(model, tmp_path / "a", **config))
    try:
        done = merge(base, LoraStack([(adapter, 1.0)]), tmp_path / "out", verify=True)
    except UnsupportedError as error:
        assert "is one tensor with" in str(error), error  # T5's stacks share their embedding
        assert (name, feature) == ("t5", "embedding")
        return
    merged = loaded(name, model, tmp_path / "out")
    peft = peft_model(model, tmp_path / "a")
    expected = output(peft, name)
    assert far(output(merged, name), expected) < TOLERANCE
    assert far(output(model, name), expected) > 100 * TOLERANCE
    assert done.changed
    assert all(one.error < 1e-3 for one in done.verified)
