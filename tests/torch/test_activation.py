"""Adapters with invocation tokens: against PEFT's aLoRA, in one pass and under generate."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from lorastack import LoraStack, load
from lorastack.errors import ArgumentError, LoraStackError, UnsupportedError
from lorastack.merging import merge
from lorastack.torch import attach, merge_into
from tests.torch.tiny import GROUPED, far

#: The invocation tokens stand in the first row twice, in the second once and in the third nowhere.
INVOCATION = [7, 9]
IDS = torch.tensor([[7, 9, 5, 7, 9, 11, 12], [5, 6, 7, 9, 20, 21, 22], [3, 4, 5, 9, 7, 10, 11]])


def model_and_peft(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
                        alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), config).eval()
    peft.save_pretrained(folder / "a")
    return model, peft


def logits(model: nn.Module, ids: torch.Tensor = IDS, **more: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, **more)


def test_they_act_from_their_last_invocation_on(tmp_path: Path) -> None:
    model, peft = model_and_peft(tmp_path)
    base, expected = logits(model).logits, logits(peft).logits
    with attach(model, load(tmp_path / "a")) as handle:
        found = logits(model).logits
        assert far(found, expected) < 1e-5
        assert torch.equal(found[2], base[2])
        assert far(found[1, :2], base[1, :2]) < 1e-6
        handle.set_scale("a", 0.0)
        assert torch.equal(logits(model).logits, base)
    assert torch.equal(logits(model).logits, base)


@pytest.mark.parametrize("options", [{}, {"num_beams": 1, "cache_implementation": "static"}])
def test_generate_goes_on_as_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    model, peft = model_and_peft(tmp_path)
    said = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        expected = peft.generate(input_ids=IDS, **said)
        plain = model.generate(input_ids=IDS, **said)
        with attach(model, load(tmp_path / "a")):
            found = model.generate(input_ids=IDS, **said)
    assert torch.equal(found, expected)
    assert torch.equal(found[2], plain[2])
    assert not torch.equal(found, plain)


def test_a_pass_that_goes_on_from_a_cache_acts_in_the_same_rows(tmp_path: Path) -> None:
    model, _ = model_and_peft(tmp_path)
    more = torch.tensor([[30], [31], [32]])
    with attach(model, load(tmp_path / "a")):
        whole = logits(model, torch.cat([IDS, more], 1)).logits[:, -1]
        first = logits(model, use_cache=True)
        found = logits(model, more, past_key_values=first.past_key_values).logits[:, -1]
    assert far(found, whole) < 1e-5
    foreign = logits(model, use_cache=True).past_key_values
    with attach(model, load(tmp_path / "a")), pytest.raises(ArgumentError, match="a cache whose tokens were not seen"):
        logits(model, more, past_key_values=foreign)


def test_rows_have_it_each_for_itself(tmp_path: Path) -> None:
    model, _ = model_and_peft(tmp_path)
    lora = load(tmp_path / "a")
    plain = lora.without_extras("alora")
    with attach(model, LoraStack([(lora, 1.0), (plain, 0.5)])) as handle:
        mixtures = [{"a": 1.0}, {"a": -0.5, "a#2": 0.3}, {}]
        with handle.rows(mixtures):
            found = logits(model).logits
        for n, mixture in enumerate(mixtures):
            handle.set_scales({name: mixture.get(name, 0.0) for name in handle.names})
            assert far(found[n : n + 1], logits(model, IDS[n : n + 1]).logits) < 1e-5


def test_what_cannot_know_the_tokens_refuses_by_name(tmp_path: Path) -> None:
    model, _ = model_and_peft(tmp_path)
    lora = load(tmp_path / "a")
    with attach(model, lora), pytest.raises(ArgumentError, match="this pass shows no input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UnsupportedError, match="a: it acts from its invocation tokens on only"):
        merge_into(model, lora)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(LoraStackError, match="invocation tokens"):
        merge(tmp_path / "base", LoraStack([(lora, 1.0)]), tmp_path / "merged")
