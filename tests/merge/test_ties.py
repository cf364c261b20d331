"""Weights with several names: what changes under one of them - attached, merged live, into files - as PEFT computes it.

BERT and its kin call their heads otherwise and tie a bias too, CTRL its embedding otherwise, encoder and decoder of
BART share one: only their own classes say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from torch import nn

from lorastack import load, merge
from lorastack.base import open_base
from lorastack.base.all_names import with_all_names
from lorastack.errors import LoraStackError, UnsupportedError
from lorastack.torch import attach, merge_into
from tests.torch.families import made
from tests.torch.test_beside import BOTH, SEEN, TEXT, bart, llama, output, trained
from tests.torch.tiny import far

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    head: str
    embedding: str
    #: The module that holds the head.
    saved: str = "lm_head"
    #: The embedding whose tokens are trained, where it is another.
    shared: str = ""


def ctrl() -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "dff": 48, "n_layer": 1, "n_head": 4}
    return tf.CTRLLMHeadModel(tf.CTRLConfig(**sizes))


def bert() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES))


def roberta() -> nn.Module:
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES))


def distilbert() -> nn.Module:
    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
    return tf.DistilBertForMaskedLM(tf.DistilBertConfig(**sizes))


def deberta() -> nn.Module:
    return tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SIZES))


def albert() -> nn.Module:
    return tf.AlbertForMaskedLM(tf.AlbertConfig(**SIZES, embedding_size=16))


MODELS = {
    "bert": Model(bert, TEXT, "decoder", "word_embeddings", "cls"),
    "bart": Model(bart, BOTH, "lm_head", "embed_tokens", shared="shared"),
    "t5": Model(lambda: made("t5"), BOTH, "lm_head", "embed_tokens", shared="shared"),
    "llama": Model(lambda: llama(tie_word_embeddings=True), TEXT, "lm_head", "embed_tokens"),
    "ctrl": Model(ctrl, TEXT, "lm_head", "w"),
    "roberta": Model(roberta, TEXT, "decoder", "word_embeddings"),
    "distilbert": Model(distilbert, TEXT, "vocab_projector", "word_embeddings", "vocab_projector"),
    "deberta": Model(deberta, TEXT, "decoder", "word_embeddings", "cls"),
    "albert": Model(albert, TEXT, "decoder", "word_embeddings", "predictions"),
}
CHANGES: dict[str, Callable[[Model], dict[str, Any]]] = {
    "the head": lambda m: {"target_modules": [m.head]},
    "the embedding": lambda m: {"target_modules": [m.embedding]},
    "a saved head": lambda m: {"target_modules": r".*(query|query_proj|q_proj|q|q_lin)", "modules_to_save": [m.saved]},
    "tokens": lambda m: {
        "target_modules": r".*(query|query_proj|q_proj|q|q_lin|Wq)",
        "trainable_token_indices": {m.shared or m.embedding: SEEN},
    },
    "tokens and the head": lambda m: {
        "target_modules": [m.head],
        "trainable_token_indices": {m.shared or m.embedding: SEEN},
    },
    "the head and biases": lambda m: {"target_modules": [m.head], "bias": "all"},
}
#: What weights cannot hold: T5 scales a tied head, and an embedding that two stacks share is one.
REFUSED = {("t5", "the head"), ("t5", "the embedding"), ("t5", "a saved head"), ("t5", "tokens and the head"),
           ("t5", "the head and biases"), ("bart", "the embedding")}  # fmt: skip
FAST = ("bert", "bart", "t5", "llama")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_what_changes_under_one_name_is_what_peft_computes(name: str, change: str, tmp_path: Path) -> None:
    if name == "ctrl" and change == "a saved head":
        pytest.skip("PEFT finds no query projection in CTRL by this pattern")
    how = MODELS[name]
    torch.manual_seed(0)
    model = how.make().eval()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    expected = output(trained(model, tmp_path / "adapter", **CHANGES[change](how)), how.inputs)
    lora, before = load(tmp_path / "adapter"), output(model, how.inputs)
    assert far(before, expected) > 1e-2
    with attach(model, lora):
        assert far(output(model, how.inputs), expected) < 1e-5
    with merge_into(model, lora, exact=True):
        assert far(output(model, how.inputs), expected) < 1e-5
    assert torch.equal(output(model, how.inputs), before)
    if (name, change) in REFUSED:
        with pytest.raises(UnsupportedError, match=r"is one tensor with|is the head too"):
            merge(tmp_path / "base", lora, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge(tmp_path / "base", lora, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    assert far(output(merged, how.inputs), expected) < 1e-5


def test_a_bias_of_a_name_that_is_tied_gets_a_tensor_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert().eval()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    expected = output(trained(model, tmp_path / "adapter", target_modules=["decoder"], lora_bias=True), TEXT)
    merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "merged")
    assert far(output(tf.BertForMaskedLM.from_pretrained(tmp_path / "merged").eval(), TEXT), expected) < 1e-5


def test_the_class_is_asked_only_where_it_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it takes a second, and transformers."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    trained(model, tmp_path / "adapter", target_modules=["lm_head"])
    asked: list[object] = []
    monkeypatch.setattr("lorastack.base.model.live_names", lambda config: asked.append(config))
    merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "merged")
    assert asked == []
    bert().save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    with_all_names(open_base(tmp_path / "bert"))
    assert len(asked) == 1


def test_without_names_of_its_class_such_a_head_fits_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = bert().eval()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    trained(model, tmp_path / "adapter", target_modules=["decoder"])
    monkeypatch.setattr("lorastack.base.model.live_names", lambda config: None)
    with pytest.raises(LoraStackError, match=r"cls\.predictions\.decoder\.weight"):
        merge(tmp_path / "base", load(tmp_path / "adapter"), tmp_path / "merged")
