"""A merged folder, loaded by transformers, against the live PEFT model and its ``merge_and_unload``."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorastack import LoraStack, load, merge
from lorastack.errors import LoraStackError
from lorastack.torch import attach
from tests.torch.test_against_peft import CASES, features
from tests.torch.tiny import ARCHITECTURES, GROUPED, far, make_model, output, save_adapter, set_scales

TOLERANCE = 1e-5
#: With layers of every kind, names of every kind; the others take a minute.
FIRST = ("llama", "gpt2", "gemma", "convnet", "roberta")


def slow_but_first(names: Iterable[Any]) -> list[Any]:
    """The cases of all architectures, most of them for `make test-slow`."""
    cases = [one if isinstance(one, tuple) else (one,) for one in names]
    return [
        pytest.param(*case, marks=[] if case[0] in FIRST else [pytest.mark.slow], id="-".join(case)) for case in cases
    ]


#: What has no place in the files of a base: a bias where there is none, and T5's one embedding for three purposes.
REFUSED = {
    **{
        (name, "lora_bias"): "has a bias of lora_B, the base no bias to add it to"
        for name in "llama qwen2 qwen3 mistral gemma gemma3 t5 whisper".split()
    },
    ("t5", "embedding"): "is one tensor with encoder.embed_tokens.weight",
    ("t5", "modules_to_save"): "which this model scales while they are one",
}


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


@pytest.mark.parametrize(("name", "feature"), slow_but_first(CASES))
def test_one_adapter_gives_pefts_output(name: str, feature: str, tmp_path: Path) -> None:
    model = make_model(name)
    base = saved_base(model, tmp_path / "base")
    config = {"target_modules": ARCHITECTURES[name][1]} | features(name)[feature]
    adapter = load(save_adapter(model, tmp_path / "a", **config))
    peft = peft_model(model, tmp_path / "a")
    if (name, feature) in REFUSED:
        with pytest.raises(LoraStackError, match=REFUSED[name, feature]):
            merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        if feature == "lora_bias":
            with pytest.raises(RuntimeError, match="base layer has no bias"):
                peft.merge_and_unload()
        return
    done = merge(base, adapter, tmp_path / "out", verify=True)
    merged = loaded(name, model, tmp_path / "out")
    expected = output(peft, name)
    assert far(output(merged, name), expected) < TOLERANCE
    assert far(output(model, name), expected) > 100 * TOLERANCE  # so that the line above can fail
    assert done.changed
    assert all(one.error < 1e-3 for one in done.verified)
    unloaded = output(peft.merge_and_unload(), name)
    if feature == "embedding" and far(unloaded, expected) > TOLERANCE:
        return  # PEFT changes a tied head along, which its live model does not
    assert far(output(merged, name), unloaded) < TOLERANCE


@pytest.mark.parametrize("name", slow_but_first(ARCHITECTURES))
def test_weighted_stacks_give_pefts_output(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    base = saved_base(model, tmp_path / "base")
    targets = ARCHITECTURES[name][1]
    configs = [{"target_modules": targets, "r": 3}, {"target_modules": targets[:1], "r": 5, "use_rslora": True}]
    folders = [save_adapter(model, tmp_path / f"a{n}", seed=n, **config) for n, config in enumerate(configs)]
    peft = peft_model(model, *folders)
    set_scales(peft, {"a0": 0.7, "a1": -0.4})
    stack = LoraStack([(load(folders[0]), 0.7), (load(folders[1]), -0.4)])
    merge(base, stack, tmp_path / "out")
    merged = loaded(name, model, tmp_path / "out")
    assert far(output(merged, name), output(peft, name)) < TOLERANCE


@pytest.mark.parametrize("order", [("dora", "plain"), ("plain", "dora"), ("dora", "other")])
@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet"])
def test_dora_stacks_act_in_the_order_of_the_stack(name: str, order: tuple[str, str], tmp_path: Path) -> None:
    model = make_model(name)
    base = saved_base(model, tmp_path / "base")
    targets = ARCHITECTURES[name][1]
    for n, kind in enumerate(("dora", "plain", "other")):
        save_adapter(model, tmp_path / kind, seed=n, target_modules=targets, use_dora=kind != "plain")
    peft = peft_model(model, *(tmp_path / kind for kind in order))
    peft.base_model.set_adapter(list(order))
    merge(base, LoraStack([(load(tmp_path / kind), 1.0) for kind in order]), tmp_path / "out", verify=True)
    assert far(output(loaded(name, model, tmp_path / "out"), name), output(peft, name)) < TOLERANCE
    stack = LoraStack([(load(tmp_path / order[0]), 0.6), (load(tmp_path / order[1]), -0.3)])
    merge(base, stack, tmp_path / "scaled", exact=True)
    with attach(model, stack):
        live = output(model, name)
    assert far(output(loaded(name, model, tmp_path / "scaled"), name), live) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_a_resized_vocabulary_is_written_and_the_configuration_follows(
    tied: bool, targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)).eval()
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="20KB")
    assert (base / "model.safetensors.index.json").exists()
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(70)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    peft = get_peft_model(copy.deepcopy(grown), config).eval()
    peft.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    merge(base, load(tmp_path / "a"), tmp_path / "out", verify=True)
    merged = loaded("llama", model, tmp_path / "out")
    assert merged.config.vocab_size == 70
    assert merged.config.tie_word_embeddings is (tied and targets == ["q_proj"])
    assert far(output(merged, "llama"), output(peft, "llama")) < TOLERANCE
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = [t.nbytes for file in (tmp_path / "out").glob("*.safetensors") for t in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(index["weight_map"]) == len(sizes)
