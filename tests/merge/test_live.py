"""A stack in the weights of a live model: what an attached one computes, and the original weights back, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from lorastack import LoadedLora, LoraStack
from lorastack.errors import ArgumentError, UnsupportedError
from lorastack.torch import attach, merge_into
from tests.torch.families import adapter_for
from tests.torch.test_against_peft import features
from tests.torch.test_experts import mixtral, qwen3_moe, run, saved
from tests.torch.test_whole import IDS, Interrupted, lora, small
from tests.torch.tiny import ARCHITECTURES, GROUPED, far, make_model, output, save_adapter

NAMES = ["llama", "gpt2", "t5", "convnet", "gemma"]
CASES = [(name, feature) for name in NAMES for feature in features(name)]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "feature"), CASES, ids=[f"{n}-{f}" for n, f in CASES])
def test_merged_is_what_attached_is_and_undoing_gives_the_base(name: str, feature: str, tmp_path: Path) -> None:
    model, on_cpu = make_model(name), len(feature) % 2 == 0
    base, before = output(model, name), state(model)
    config = {"target_modules": ARCHITECTURES[name][1]} | features(name)[feature]
    one = LoadedLora.load(save_adapter(model, tmp_path / "one", **config))
    two = LoadedLora.load(save_adapter(model, tmp_path / "two", seed=1, target_modules=ARCHITECTURES[name][1][:1]))
    stack = LoraStack([(one, 0.6), (two, -0.4)])
    with attach(model, stack):
        live = output(model, name)
    done = merge_into(model, stack, keep_on_cpu=on_cpu, exact=on_cpu)
    assert far(output(model, name), live) < 1e-5
    assert far(base, live) > 1e-3
    assert done.nbytes > 0
    done.undo()
    done.undo()
    assert torch.equal(output(model, name), base)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_in_one_parameter(make, tmp_path: Path) -> None:
    model = make()
    before = state(model)
    adapter = LoadedLora.load(saved(model, tmp_path / "a", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], 1))
    with attach(model, adapter):
        live = run(model)
    with merge_into(model, adapter):
        assert far(run(model), live) < 1e-5
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_tied_head_stays_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval()
    adapter = LoadedLora.load(save_adapter(model, tmp_path / "a", target_modules=["embed_tokens", "q_proj"]))
    with attach(model, adapter):
        live = output(model, "llama")
    with merge_into(model, adapter):
        assert far(output(model, "llama"), live) < 1e-5
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merged_twice_is_taken_back_from_the_last_one() -> None:
    model = small()
    base = model(IDS)
    first = merge_into(model, lora("a", 0))
    once = model(IDS)
    second = merge_into(model, lora("b", 1, extras=True))
    with pytest.raises(ArgumentError, match=r"MergedStack.*of b.* was merged later; take that back first"):
        first.undo()
    second.undo()
    assert torch.equal(model(IDS), once)
    first.undo()
    assert torch.equal(model(IDS), base)


def test_what_is_attached_is_not_merged_into_and_what_does_not_fit_changes_nothing() -> None:
    model = small()
    base = model(IDS)
    with attach(model, lora("a", 0)):
        for part in (model, model.one, nn.Sequential(model)):
            with pytest.raises(ArgumentError, match="has a stack attached already"):
                merge_into(part, lora("b", 1))
    with pytest.raises(UnsupportedError, match=r"weight nowhere\.weight is none of the model's"):
        merge_into(model, LoraStack([(lora("a", 0), 1.0), (adapter_for({"nowhere.weight": (3, 3)}), 1.0)]))
    stack = LoraStack([(lora("a", 0, extras=True), 1.0), (lora("b", 1, extras=True), 1.0)])
    with pytest.raises(UnsupportedError, match=r"a and b both replace bias one\.bias, table"):
        merge_into(model, stack)
    packed = copy.deepcopy(model)
    packed.one.weight = nn.Parameter(packed.one.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"weight one\.weight is packed, or kept elsewhere"):
        merge_into(packed, lora("a", 0))
    assert torch.equal(model(IDS), base)


def test_an_interrupt_anywhere_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorastack.torch import merged

    add, stopped = merged._add, 0
    for at in range(4):
        model, calls = small(), 0
        before = state(model)

        def counted(*words: object, at: int = at) -> None:
            nonlocal calls
            calls += 1
            add(*words)
            if calls == at + 1:
                raise Interrupted

        monkeypatch.setattr(merged, "_add", counted)
        try:
            merge_into(model, lora("a", 0, extras=True))
        except Interrupted:
            stopped += 1
            assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert stopped == 3


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    old = model[0].weight.detach().double().numpy()
    stack = LoraStack([(adapter_for({"0.weight": (48, 64)}, seed=n), 0.01) for n in range(4)])
    wanted = old + sum(
        s * d.scaling * (d.b.astype(np.float64) @ d.a.astype(np.float64)) for s, d in stack.terms("0.weight")
    )
    with merge_into(model, stack, exact=True):
        found = model[0].weight.detach().double().numpy()
    assert np.abs(found - wanted).max() <= np.abs(wanted).max() * 2**-8
    assert (found == torch.from_numpy(wanted).to(torch.bfloat16).double().numpy()).mean() > 0.999
