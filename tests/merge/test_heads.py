"""Heads that the base does not have: the new base is of the class that the adapter was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

from lorastack import load, merge
from lorastack.errors import NamingError
from tests.torch.tiny import far

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 30, 7]])
#: Saved as -> trained as, its task, target modules.
CASES = {
    "roberta": (tf.RobertaConfig, tf.RobertaForMaskedLM, tf.RobertaForSequenceClassification, "SEQ_CLS", "query value"),
    "bert": (tf.BertConfig, tf.BertForMaskedLM, tf.BertForTokenClassification, "TOKEN_CLS", "query value"),
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, tf.LlamaForSequenceClassification, "SEQ_CLS", "q_proj v_proj"),
    "backbone": (tf.LlamaConfig, tf.LlamaModel, tf.LlamaForSequenceClassification, "SEQ_CLS", "q_proj"),
    "distilbert": (tf.DistilBertConfig, tf.DistilBertForMaskedLM, tf.DistilBertForSequenceClassification, "SEQ_CLS",
                   "q_lin v_lin"),
}  # fmt: skip


def trained(name: str, folder: Path, labels: int) -> tuple[type, torch.Tensor]:
    """A base and an adapter with a head of its own; the class, and what PEFT computes."""
    config, before, after, task, targets = CASES[name]
    torch.manual_seed(0)
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4} if name == "distilbert" else {}
    before(config(**SIZES, **sizes)).save_pretrained(folder / "base")
    with torch.device("cpu"):
        model = after.from_pretrained(folder / "base", num_labels=labels).eval()
    options = LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(), task_type=task, init_lora_weights=False)
    peft = get_peft_model(model, options)
    for key, weight in peft.named_parameters():
        if "modules_to_save" in key:
            torch.nn.init.normal_(weight)
    peft.save_pretrained(folder / "adapter")
    fresh = PeftModel.from_pretrained(after.from_pretrained(folder / "base", num_labels=labels), folder / "adapter")
    with torch.no_grad():
        return after, fresh.eval()(IDS).logits


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_head_comes_along(name: str, labels: int, tmp_path: Path) -> None:
    after, wanted = trained(name, tmp_path, labels)
    merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "out", verify=True)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architectures"] == [after.__name__]
    merged, info = after.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert merged.config.num_labels == labels
    with torch.no_grad():
        assert far(merged.eval()(IDS).logits, wanted) < 1e-5


def test_a_head_of_no_known_class_is_refused(tmp_path: Path) -> None:
    trained("roberta", tmp_path, 2)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": None}))
    with pytest.raises(NamingError, match=r"modules_to_save classifier\.\S+ is none of the base's"):
        merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
