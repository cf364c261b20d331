"""The handle: attach, change while running, detach; and that nothing is silent."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lorastack import LoadedLora, LoraDelta, LoraStack, TargetModule
from lorastack.errors import ArgumentError, UnknownNameError, UnsupportedError
from lorastack.torch import attach
from tests.torch.tiny import MLP, far, make_model, output, save_adapter, tokens


@pytest.fixture
def setup(tmp_path: Path):
    model = make_model("llama")
    return model, [
        LoadedLora.load(save_adapter(model, tmp_path / f"a{n}", seed=n, r=2 + n, target_modules=MLP)) for n in range(3)
    ]


def merged(model: nn.Module, words: list[tuple[LoadedLora, float]]) -> nn.Module:
    """A copy whose weights were changed by the plain formula in float64."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for lora, scale in words:
            for name, delta in lora.adapters.items():
                weight = twin.get_parameter(name)
                update = scale * delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))
                weight.copy_((weight.double() + torch.from_numpy(update)).float())
    return twin


def test_attached_equals_merged_equals_baked(setup) -> None:
    model, (a, b, c) = setup
    words = [(a, 0.7), (b, -0.4), (c, 1.5)]
    stack = LoraStack(words)
    expected = output(merged(model, words), "llama")
    with attach(model, stack):
        attached = output(model, "llama")
    with attach(model, stack.bake()):
        baked = output(model, "llama")
    assert far(attached, expected) < 1e-5
    assert far(baked, expected) < 1e-5


def test_one_adapter_at_scale_one_is_itself_and_scale_zero_is_the_base(setup) -> None:
    model, (a, *_) = setup
    base, expected = output(model, "llama"), output(merged(model, [(a, 1.0)]), "llama")
    with attach(model, LoraStack([(a, 1.0)])) as handle:
        assert far(output(model, "llama"), expected) < 1e-5
        handle.set_scale("a0", 0.0)
        assert torch.equal(output(model, "llama"), base)


def test_changes_while_attached_equal_attaching_anew(setup) -> None:
    model, (a, b, c) = setup

    def fresh(words: list[tuple[LoadedLora, float]]) -> torch.Tensor:
        return output(merged(model, words), "llama")

    expected = [fresh(w) for w in ([(a, 1.0)], [(a, 0.3)], [(a, 0.3), (b, 0.5)], [(a, 0.3), (b, 0.5), (c, -1.0)],
                                   [(b, 0.5), (c, -1.0)], [(c, -1.0), (a, 0.5)], [(c, -1.0)])]  # fmt: skip
    found = []
    with attach(model, LoraStack([(a, 1.0)])) as handle:
        found.append(output(model, "llama"))
        handle.set_scale("a0", 0.3)
        found.append(output(model, "llama"))
        assert handle.push(b, 0.5) == "a1"
        found.append(output(model, "llama"))
        handle.push(c, -1.0)
        found.append(output(model, "llama"))
        assert handle.remove("a0") == (a, 0.3)
        found.append(output(model, "llama"))
        assert handle.replace("a1", a) == "a0"
        found.append(output(model, "llama"))
        assert handle.scales == {"a2": -1.0, "a0": 0.5}
        assert handle.pop() == (a, 0.5)
        found.append(output(model, "llama"))
        assert [(lora.name, scale) for lora, scale in handle.stack.entries] == [("a2", -1.0)]
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert far(one, other) < 1e-5, n


def test_the_same_adapter_twice_counts_twice(setup) -> None:
    model, (a, *_) = setup
    expected = output(merged(model, [(a, 1.0)]), "llama")
    with attach(model, LoraStack([(a, 0.5), (a, 0.5)])) as handle:
        assert handle.names == ("a0", "a0#2")
        assert far(output(model, "llama"), expected) < 1e-5


class ByTarget:
    """An adapter of the user's own, without layers."""

    rank, alpha, target_modules = 2, 8.0, (TargetModule.QUERY_PROJ, TargetModule.DOWN_PROJ)

    def delta(self, target: TargetModule, layer: int) -> LoraDelta | None:
        if target not in self.target_modules or layer != 1:
            return None
        rng = np.random.default_rng(layer)
        sizes = {TargetModule.QUERY_PROJ: (32, 32), TargetModule.DOWN_PROJ: (48, 32)}[target]
        return LoraDelta(0.1 * rng.standard_normal((2, sizes[0])), 0.1 * rng.standard_normal((sizes[1], 2)))


def test_both_lists_are_attached(setup) -> None:
    model, (a, *_) = setup
    stack = LoraStack([(a, 0.5)])
    own = ByTarget()
    stack.push_adapter(own)
    names = {TargetModule.QUERY_PROJ: "self_attn.q_proj", TargetModule.DOWN_PROJ: "mlp.down_proj"}
    deltas = {f"model.layers.1.{names[t]}.weight": own.delta(t, 1).scaled(4.0) for t in own.target_modules}
    expected = output(merged(model, [(a, 0.5), (LoadedLora.from_tensors(deltas), 1.0)]), "llama")
    with attach(model, stack) as handle:
        assert far(output(model, "llama"), expected) < 1e-5
        assert handle.names == ("a0", "adapter1")
        assert sorted(handle.report.matched["adapter1"]) == sorted(deltas)


def test_the_report_says_what_matched(setup) -> None:
    model, (a, *_) = setup
    with attach(model, a) as handle:
        assert sorted(handle.report.matched["a0"]) == sorted(a.adapters)
        assert "a0: 14 weights attached" in str(handle.report)


def test_everything_that_does_not_fit_is_in_one_error_and_nothing_is_changed(setup) -> None:
    model, (a, *_) = setup
    rng = np.random.default_rng(0)
    bad = LoadedLora.from_tensors(
        {
            "model.layers.0.self_attn.q_proj.weight": (rng.standard_normal((2, 16)), rng.standard_normal((32, 2))),
            "model.layers.7.self_attn.q_proj.weight": (rng.standard_normal((2, 32)), rng.standard_normal((32, 2))),
            "model.layers.1.mlp.nothing.weight": (rng.standard_normal((2, 32)), rng.standard_normal((32, 2))),
        },
        name="bad",
    )
    base = output(model, "llama")
    with pytest.raises(UnsupportedError) as caught:
        attach(model, LoraStack([(a, 1.0), (bad, 1.0)]))
    assert len(caught.value.problems) == 3
    for line in ("bad: weight model.layers.0.self_attn.q_proj.weight: the module is 32 -> 32, the update 16 -> 32",
                 "bad: weight model.layers.7.self_attn.q_proj.weight is none of the model's",
                 "bad: weight model.layers.1.mlp.nothing.weight is none of the model's"):  # fmt: skip
        assert line in caught.value.problems
    assert torch.equal(output(model, "llama"), base)
    attach(model, a).detach()  # nothing was left behind


def test_allow_partial_reports_what_was_left_out(setup) -> None:
    model, _ = setup
    rng = np.random.default_rng(0)
    known, gone = "model.layers.0.self_attn.q_proj.weight", "model.layers.7.self_attn.q_proj.weight"
    lora = LoadedLora.from_tensors(
        {n: (rng.standard_normal((2, 32)), rng.standard_normal((32, 2))) for n in (known, gone)}, name="x"
    )
    with attach(model, lora, allow_partial=True) as handle:
        assert handle.report.matched == {"x": [known]}
        assert handle.report.missing == {"x": [f"weight {gone} is none of the model's"]}
        assert f"x: left out: weight {gone}" in str(handle.report)


def test_nan_is_refused_before_anything_is_changed_and_every_factor_is_named(setup) -> None:
    model, _ = setup
    a = np.full((2, 32), np.nan, np.float32)
    b = np.full((32, 2), np.inf, np.float32)
    lora = LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": (a, b)}, name="x")
    with pytest.raises(UnsupportedError) as caught:
        attach(model, lora)
    assert len(caught.value.problems) == 2
    assert "lora_A: 64 of 64 values are NaN or Inf" in caught.value.problems[0]


def test_nan_that_was_let_in_adds_nothing_at_scale_zero(setup) -> None:
    model, _ = setup
    a, b = np.full((2, 48), np.nan, np.float32), np.full((32, 2), np.inf, np.float32)
    lora = LoadedLora.from_tensors({"model.layers.0.mlp.down_proj.weight": (a, b)}, name="x", allow_nonfinite=True)
    base = output(model, "llama")
    with attach(model, lora) as handle:
        assert output(model, "llama").isnan().any()
        handle.set_scale("x", 0.0)
        assert torch.equal(output(model, "llama"), base)


def test_attaching_twice_is_an_error_that_says_so(setup) -> None:
    model, (a, b, _) = setup
    with attach(model, a), pytest.raises(ArgumentError, match="has a stack attached already"):
        attach(model, b)
    attach(model, b).detach()


def test_an_empty_stack_is_attached_and_pushed_to(setup) -> None:
    model, (a, b, _) = setup
    base, expected = output(model, "llama"), output(merged(model, [(a, 0.7), (b, 0.3)]), "llama")
    with attach(model, LoraStack()) as handle:
        assert (handle.names, handle.scales, handle.stack.is_empty(), handle.report.nbytes) == ((), {}, True, 0)
        assert handle.pop() is None
        assert torch.equal(output(model, "llama"), base)
        with handle.rows([{}, {}]):
            assert torch.equal(output(model, "llama"), base)
        for _ in range(2):  # popped down to nothing, it takes them again
            assert (handle.push(a, 0.7), handle.push(b, 0.3)) == ("a0", "a1")
            assert far(output(model, "llama"), expected) < 1e-5
            assert (handle.pop(), handle.pop(), handle.pop()) == ((b, 0.3), (a, 0.7), None)
            assert torch.equal(output(model, "llama"), base)
    assert torch.equal(output(model, "llama"), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    attach(model, a).detach()


def test_a_detached_handle_is_an_error(setup) -> None:
    model, (a, *_) = setup
    handle = attach(model, a)
    handle.detach()
    handle.detach()
    with pytest.raises(ArgumentError, match="this handle is detached"):
        handle.set_scale("a0", 1.0)


def test_an_unknown_name_changes_nothing(setup) -> None:
    model, (a, *_) = setup
    with attach(model, a) as handle:
        with pytest.raises(UnknownNameError, match="no adapter is named 'zara'; attached are a0"):
            handle.set_scales({"a0": 0.0, "zara": 1.0})
        assert handle.scales == {"a0": 1.0}


def test_a_push_that_fails_leaves_the_handle_as_it_was(setup) -> None:
    model, (a, *_) = setup
    rng = np.random.default_rng(0)
    bad = LoadedLora.from_tensors(
        {"nowhere.weight": (rng.standard_normal((2, 3)), rng.standard_normal((3, 2)))}, name="bad"
    )
    with attach(model, a) as handle:
        before = output(model, "llama")
        for change in (lambda: handle.push(bad), lambda: handle.replace("a0", bad)):
            with pytest.raises(UnsupportedError, match=r"bad: weight nowhere\.weight is none of the model's"):
                change()
        assert handle.names == ("a0",)
        assert torch.equal(output(model, "llama"), before)


def test_an_exception_inside_the_context_detaches_all_the_same(setup) -> None:
    model, (a, *_) = setup
    base, before = output(model, "llama"), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="boom"), attach(model, a):
        raise KeyError("boom")
    assert torch.equal(output(model, "llama"), base)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_two_adapters_that_replace_the_same_module_are_an_error(tmp_path: Path) -> None:
    model = make_model("llama")
    loras = [
        LoadedLora.load(
            save_adapter(model, tmp_path / f"s{n}", seed=n, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        for n in range(2)
    ]
    with pytest.raises(UnsupportedError, match="s0 and s1 both replace lm_head; attach only one"):
        attach(model, LoraStack([(lora, 1.0) for lora in loras]))
    with attach(model, loras[0]) as handle:
        with pytest.raises(UnsupportedError, match="s0 and s1 both replace lm_head"):
            handle.push(loras[1])
        handle.replace("s0", loras[1])
        assert handle.names == ("s1",)
        handle.set_scale("s1", 0.0)
        at_zero = output(model, "llama")
    assert torch.equal(at_zero, output(model, "llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_live_in_the_layers_type_or_in_float32_on_request(setup, dtype: torch.dtype) -> None:
    model, (a, b, _) = setup
    exact = output(merged(model, [(a, 0.7), (b, 0.3)]), "llama")
    half = copy.deepcopy(model).to(dtype)
    stack = LoraStack([(a, 0.7), (b, 0.3)])
    for asked, held in ((None, dtype), (torch.float32, torch.float32)):
        with attach(half, stack, dtype=asked) as handle:
            assert {layer.a.dtype for layer in handle._layers.values()} == {held}
            found = output(half, "llama")
        assert found.dtype == dtype
        assert far(found.float(), exact) < (0.08 if dtype == torch.bfloat16 else 0.02)


def test_one_copy_of_the_factors_is_held(setup) -> None:
    model, three = setup
    size = sum(f.shape[0] * f.shape[1] * 4 for lora in three for d in lora.adapters.values() for f in d.factors)
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle:
        assert handle.report.nbytes <= 1.5 * size


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linear_layers_are_changed_by_their_inputs_and_outputs(setup) -> None:
    model, (a, b, _) = setup
    # Deprecated in favour of torchao, but torch's own and without a further dependency.
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantised.model.layers[0].mlp.up_proj).__module__
    base = output(quantised, "llama")
    with torch.no_grad(), attach(quantised, LoraStack([(a, 0.7), (b, 0.3)])):
        hidden = torch.randn(3, 32)
        layer = quantised.model.layers[0].mlp.up_proj
        found = layer(hidden)
    plain = layer(hidden)
    name = "model.layers.0.mlp.up_proj.weight"
    update = 0.7 * torch.from_numpy(a.adapters[name].dense()) + 0.3 * torch.from_numpy(b.adapters[name].dense())
    torch.testing.assert_close(found, plain + hidden @ update.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(quantised, "llama"), base)


def test_tied_embeddings_are_changed_where_the_adapter_says_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    import transformers as tf

    from tests.torch.tiny import GROUPED

    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval()
    rng = np.random.default_rng(0)
    a, b = 0.1 * rng.standard_normal((2, 64)), 0.1 * rng.standard_normal((32, 2))
    lora = LoadedLora.from_tensors({"model.embed_tokens.weight": LoraDelta(a, b, kind="embedding")}, name="e")
    ids = tokens()
    with torch.no_grad():
        vectors = model.model.embed_tokens(ids) + torch.from_numpy((b @ a).T).float()[ids]
        expected = model(inputs_embeds=vectors).logits
        with attach(model, lora):
            found = model(input_ids=ids).logits
    assert far(found, expected) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_flow_through_and_checkpointing_gives_the_same(setup) -> None:
    model, (a, *_) = setup
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    grads = []
    with attach(model, a):
        for checkpointing in (False, True):
            model.train()
            model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
            model.zero_grad()
            model(input_ids=tokens()).logits.square().mean().backward()
            grads.append(model.get_input_embeddings().weight.grad.clone())
    model.eval()
    twin = merged(model, [(a, 1.0)])
    twin.zero_grad()
    twin(input_ids=tokens()).logits.square().mean().backward()
    assert far(grads[0], twin.get_input_embeddings().weight.grad) < 1e-4
    assert far(grads[1], grads[0]) < 1e-6


def test_compiled_models_give_the_same_and_a_scale_change_recompiles_nothing(setup) -> None:
    model, (a, b, _) = setup
    torch._dynamo.reset()
    expected = output(merged(model, [(a, -0.2), (b, 0.3)]), "llama")
    with attach(model, LoraStack([(a, 0.7), (b, 0.3)])) as handle:
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            assert far(compiled(input_ids=tokens()).logits, output(model, "llama")) < 1e-5
            with torch._dynamo.config.patch(error_on_recompile=True):
                handle.set_scale("a0", -0.2)
                found = compiled(input_ids=tokens()).logits
        assert far(found, expected) < 1e-5
    torch._dynamo.reset()


def test_a_module_called_by_keyword_is_changed_all_the_same() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(input=x)

    model = Keyword().eval()
    factors = np.arange(3, dtype=np.float32)[None], np.array([[1.0], [2.0]], np.float32)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    base = model(x)
    with attach(model, LoadedLora.from_tensors({"lin.weight": factors}, naming="hf")):
        assert torch.allclose(model(x), base + torch.tensor([[8.0, 16.0]]))
