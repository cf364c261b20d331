"""Files of transformers' own classes: what is merged into them, and extracted from them, does what live adapters do."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorastack import extract, load, merge
from lorastack.errors import UnsupportedError
from lorastack.torch import attach
from tests.torch.architectures import Architecture, architectures, inputs_of, made, targets_of
from tests.torch.test_architectures import near, outputs, saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ALL = [*architectures(usual=True), *architectures(usual=False)]
#: What transformers itself does not load as it saved it, and one whose layers give pairs.
NOT_AS_SAVED = {"seq2seq-marian", "masked-ibert"}
#: What transformers makes of several tensors, or with other numbers, is none of the files' own.
REFUSED = {
    *("causal-hrm_text", "causal-inkling2_loop_text", "causal-inkling2_text", "causal-lara_mini", "causal-nemotron_h"),
    *("masked-gte", "masked-jina_embeddings_v3", "masked-nomic_bert"),
}


def ready(one: Architecture) -> tuple[nn.Module, Any]:
    """A tiny model that runs, and inputs for it."""
    if str(one) in NOT_AS_SAVED:
        pytest.skip("transformers does not load this class as it saved it, or computes with other weights")
    try:
        model = made(one)
        inputs = inputs_of(one.family, model)
        outputs(model, inputs)
    except Exception as error:  # what a class asks for beyond sizes
        pytest.skip(f"no tiny model of it: {type(error).__name__}")
    return model, inputs


def reloaded(like: nn.Module, folder: Path) -> nn.Module:
    return type(like).from_pretrained(folder).eval()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("one", ALL, ids=str)
def test_files_get_what_a_live_model_gets(one: Architecture, tmp_path: Path) -> None:
    model, inputs = ready(one)
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    try:
        outputs(saved(model, tmp_path / "adapter", **targets_of(one, model)), inputs)
    except Exception as error:
        pytest.skip(f"PEFT makes no adapter of it that runs: {type(error).__name__}")
    lora = load(tmp_path / "adapter")
    with attach(model, lora):
        expected = outputs(model, inputs)
    if str(one) in REFUSED:
        with pytest.raises(UnsupportedError, match="none of the files' own"):
            merge(tmp_path / "base", lora, tmp_path / "merged")
    else:
        merge(tmp_path / "base", lora, tmp_path / "merged")
        assert near(outputs(reloaded(model, tmp_path / "merged"), inputs), expected)


@pytest.mark.parametrize("one", ALL, ids=str)
def test_a_fine_tune_comes_back_out_of_files(one: Architecture, tmp_path: Path) -> None:
    """All of it, or what has no place in an adapter is named."""
    model, inputs = ready(one)
    tuned, noise = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    expected = outputs(reloaded(model, tmp_path / "tuned"), inputs)
    lora = extract(tmp_path / "tuned", tmp_path / "base", rank=4096, save_rest=True)
    with attach(model, load(lora.save(tmp_path / "adapter"))):
        found = outputs(model, inputs)
    assert near(found, expected) or lora.made.get("unsaved")
