"""A change of a live model is whole or not at all, leaves nothing behind, and has an effect or says so."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from lorastack import LoadedLora, LoraStack
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, UnsupportedError
from lorastack.torch import attach, detach
from tests.torch.families import adapter_for, linear_weights, logits, made
from tests.torch.tiny import COMMON, far, tokens


class Small(nn.Module):
    """Layers of every kind that is hooked or shown, small enough to interrupt a change at each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.bare = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.two(self.one(self.table(ids))), self.bare)


IDS = torch.tensor([[0, 3, 8]])


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def lora(name: str, seed: int, extras: bool = False) -> LoadedLora:
    from dataclasses import replace

    rng = np.random.default_rng(seed)
    shapes = {"one.weight": (5, 6), "two.weight": (4, 5), "bare": (4, 4)}
    factors = {
        weight: (rng.standard_normal((2, n_in), np.float32), rng.standard_normal((n_out, 2), np.float32))
        for weight, (n_out, n_in) in shapes.items()
    }
    made = LoadedLora.from_tensors(factors, alpha=4, name=name, naming="hf")
    if not extras:
        return made
    saved = {
        "bias": {"one.bias": Factor.of(rng.standard_normal(5).astype(np.float32), "bias")},
        "modules_to_save": {"table.weight": Factor.of(rng.standard_normal((9, 6)).astype(np.float32), "saved")},
    }
    return replace(made, extras=saved)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "attach": lambda model, _: attach(model, LoraStack([(lora("a", 0), 1.0), (lora("x", 7, extras=True), 0.5)])),
    "push": lambda _, handle: handle.push(lora("c", 2, extras=True), 0.7),
    "replace": lambda _, handle: handle.replace("a", lora("c", 2, extras=True), 0.7),
    "remove": lambda _, handle: handle.remove("a"),
    "set_scales": lambda _, handle: handle.set_scales({"a": 0.3, "b": 0.1}),
}


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest itself would act on."""


def interrupted(change: Callable[[], Any], at: int) -> bool:
    """Run ``change``, stopped at the n-th line of this package that it comes to; False when it has fewer."""
    count = 0

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if (
            frame.f_code.co_name in ("_bring_back", "release", "clear", "restore", "detach", "attach_again", "sweep")
            and event != "call"
        ):
            return line  # what brings everything back is not stopped a second time
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                raise Interrupted
        return line

    def enter(frame: Any, event: str, argument: Any) -> Any:
        return line if "/lorastack/torch/" in frame.f_code.co_filename else None

    sys.settrace(enter)
    try:
        change()
    except Interrupted:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_is_interrupted_anywhere_changes_nothing(name: str, stride: int) -> None:
    """At every line, or at every third."""
    step, stopped = 1, 0
    while True:
        model = small()
        handle = None if name == "attach" else attach(model, LoraStack([(lora("a", 0), 1.0), (lora("b", 1), -0.5)]))
        before = model(IDS)
        there = hooks(model), dict(model._modules), handle and (handle.names, handle.scales)
        if not interrupted(lambda model=model, handle=handle: CHANGES[name](model, handle), step):
            break
        stopped += 1
        after = hooks(model), dict(model._modules), handle and (handle.names, handle.scales)
        assert after == there, step
        assert torch.equal(model(IDS), before), step
        if step % 7 == 1:  # and the next change is right
            again = CHANGES[name](model, handle)
            expected = small()
            twin = (
                None if name == "attach" else attach(expected, LoraStack([(lora("a", 0), 1.0), (lora("b", 1), -0.5)]))
            )
            CHANGES[name](expected, twin)
            assert torch.equal(model(IDS), expected(IDS)), (step, again)
        step += stride
    assert stopped > 20 // stride


def test_a_push_that_fails_leaves_no_bias_twice_and_detaching_leaves_the_base() -> None:
    model = small()
    base = model(IDS)
    handle = attach(model, lora("a", 0, extras=True))
    alone = model(IDS)
    with pytest.raises(UnsupportedError):
        handle.push(adapter_for({"nowhere.weight": (3, 3)}))
    handle.push(lora("b", 1), 0.0)
    assert far(model(IDS), alone) < 1e-6, "the first adapter's bias counts once"
    handle.detach()
    assert torch.equal(model(IDS), base)
    assert hooks(model) == 0


def test_copies_children_and_parents_are_not_attached_twice() -> None:
    model = small()
    base = model(IDS)
    handle = attach(model, lora("a", 0))
    changed = model(IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), changed)
    for other in (twin, model.one, nn.Sequential(model)):
        with pytest.raises(ArgumentError, match="has a stack attached already, or is a copy or a part of one"):
            attach(other, lora("a", 0))
    detach(twin)
    assert torch.equal(twin(IDS), base)
    attach(twin, lora("a", 0)).detach()
    handle.detach()
    assert torch.equal(model(IDS), base)


class Everything(nn.Module):
    """A model with a place for each kind of extra."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.saved = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 9, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.saved(self.one(self.table(ids)))


def with_everything() -> LoadedLora:
    from dataclasses import replace

    rng = np.random.default_rng(4)

    def factor(*shape: int) -> Factor:
        return Factor.of(rng.standard_normal(shape).astype(np.float32), "made")

    one = LoadedLora.from_tensors(
        {"one.weight": (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))}, name="a", naming="hf"
    )
    tokens = {"table.weight": ((3, 8), factor(2, 6))}
    saved = {"saved.weight": factor(9, 5)}
    return replace(one, extras={"bias": {"one.bias": factor(5)}, "modules_to_save": saved, "new_tokens": tokens})


def test_a_copy_is_brought_back_to_the_base_with_all_that_was_saved() -> None:
    torch.manual_seed(0)
    model = Everything()
    base, before = model(IDS), {key: value.clone() for key, value in model.state_dict().items()}
    handle = attach(model, with_everything())
    changed = model(IDS)
    twin, kept = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(twin(IDS), changed)
    detach(twin)
    assert torch.equal(twin(IDS), base)
    assert hooks(twin) == 0
    state = twin.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert twin.saved is not model.saved
    assert torch.equal(model(IDS), changed), "the copy's end is not the model's"
    handle.detach()
    assert torch.equal(model(IDS), base)
    assert torch.equal(kept(IDS), changed), "a copy keeps what it has"
    detach(kept)
    assert torch.equal(kept(IDS), base)
    attach(twin, with_everything())
    assert torch.equal(twin(IDS), changed)


@pytest.mark.parametrize("compiler", [False, True])
@pytest.mark.parametrize("what", ["updates", "extras", "a part", "a bare parameter", "nothing"])
def test_an_attached_model_says_why_it_is_not_pickled(
    what: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler:
        importlib.import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)  # hooks are made otherwise without it
    model: Any = Everything() if what == "extras" else small()
    handle = attach(model, {"extras": with_everything(), "nothing": LoraStack()}.get(what, lora("a", 0)))
    part = {"a part": lambda: model.one, "a bare parameter": lambda: model.__dict__["bare"]}.get(what, lambda: model)()
    for pickled in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(ArgumentError, match=r"has a stack attached cannot be pickled; detach it, or .*state_dict"):
            pickled(part)
    torch.save(model.state_dict(), io.BytesIO())
    handle.detach()
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), model(IDS))


def test_handles_say_that_they_are_not_to_be_copied() -> None:
    model = small()
    handle = attach(model, lora("a", 0))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ArgumentError, match=r"attached to one live model, and cannot be .*\.stack"):
            copied(handle)


def cycle(model: nn.Module, one: LoadedLora) -> None:
    with attach(model, one) as handle:
        handle.push(lora("b", 1))
        handle.set_scale("a", 0.5)
        handle.pop()
        with torch.no_grad():
            model(IDS)


def held() -> tuple[int, int]:
    """What Python holds: objects, and bytes that were allocated since `tracemalloc` began."""
    gc.collect()
    return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("cycles", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_cycles_leave_nothing(cycles: int) -> None:
    model, one = small(), lora("a", 0, extras=True)
    base = model(IDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}, set(model.__dict__)
    cycle(model, one)
    found = []
    tracemalloc.start()
    try:
        for _ in range(4):
            for _ in range(cycles // 4):
                cycle(model, one)
            found.append(held())
    finally:
        tracemalloc.stop()
    # In the first half, torch and Python make what they keep once: 40 kB and ten objects.
    assert abs(found[3][0] - found[1][0]) < 40, f"objects: {found}"
    assert found[3][1] - found[1][1] < 32_000, f"bytes: {found}"
    assert hooks(model) == 0
    assert torch.equal(model(IDS), base)
    assert set(model.__dict__) == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("what", ["attached", "detached", "with rows", "in a pass that failed", "refused", "copied"])
def test_dropped_models_are_collected(what: str) -> None:
    gone = []
    for _ in range(20):
        model = small()
        if what == "refused":
            with pytest.raises(UnsupportedError):
                attach(model, adapter_for({"nowhere.weight": (3, 3)}))
        elif what == "with rows":
            handle = attach(model, adapter_for({"one.weight": (5, 6)}))
            with handle.rows([{"made": 1.0}]):
                model(IDS)
        else:
            handle = attach(model, lora("a", 0, extras=True))
            model(IDS)
            if what == "detached":
                handle.detach()
            elif what == "copied":
                gone.append(weakref.ref(copy.deepcopy(model)))
            elif what == "in a pass that failed":
                with pytest.raises(IndexError):
                    model(torch.tensor([[99]]))
        gone += [weakref.ref(part) for part in (model, model.one, model.bare)]
    del model
    handle = None
    gc.collect()
    assert [ref() for ref in gone if ref() is not None] == []


def test_a_module_that_was_replaced_is_said() -> None:
    model = small()
    handle = attach(model, lora("a", 0))
    model.one = nn.Linear(6, 5)
    with pytest.raises(UnsupportedError, match="modules were replaced since, so that the stack has no effect there"):
        handle.push(lora("b", 1))
    assert handle.names == ("a",)


def test_outputs_that_hooks_on_all_modules_keep_stay_as_they_were() -> None:
    model, kept = small(), []

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            kept.append((output, output.clone()))

    hook = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        with torch.no_grad(), attach(model, lora("a", 0)):
            model(IDS)
    finally:
        hook.remove()
    assert kept
    assert all(torch.equal(one, copied) for one, copied in kept)


# ---- numbers


def test_float64_layers_compute_in_float64() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False, dtype=torch.float64))
    one = LoadedLora.from_tensors(
        {"0.weight": (np.ones((2, 6)) / 3, np.ones((5, 2)))}, alpha=0.7, name="a", naming="hf"
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        base = model(x)
        with attach(model, LoraStack([(one, 0.1)])) as handle:
            delta = one.adapters["0.weight"]
            dense = torch.from_numpy(delta.b @ delta.a * (delta.scaling * 0.1))
            assert far(model(x), base + x @ dense.T) < 1e-15
            with handle.rows([{"a": 0.1}] * 3):
                assert far(model(x), base + x @ dense.T) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_multiplier_that_is_infinite_in_the_layers_type_is_an_error(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype))
    large = float(torch.finfo(dtype).max) * 1.5
    a, b = np.full((1, 6), 1e-3, np.float32), np.full((5, 1), 1e-3, np.float32)
    one = LoadedLora.from_tensors({"0.weight": (a, b)}, alpha=1.0, name="a", naming="hf")
    if dtype == torch.float16:
        with pytest.raises(UnsupportedError, match=r"infinite in float16"):
            attach(model, LoraStack([(one, large)]))
        with attach(model, LoraStack([(one, large)]), dtype=torch.float32):
            pass
    with attach(model, one) as handle:
        before = handle.scales
        with pytest.raises(ArgumentError, match=r"a: scale .* is infinite in|finite number"):
            handle.set_scale("a", large)
        assert handle.scales == before


# ---- weights that are read without their layer


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        return self.head(h + self.attn(h, h, h, need_weights=self.training)[0])


def siglip() -> nn.Module:
    config = tf.SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                   image_size=8, patch_size=4)  # fmt: skip
    return tf.SiglipVisionModel(config)


def pictures(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    return model(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output


def mamba(cls: str) -> nn.Module:
    config = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return getattr(tf, f"{cls}ForCausalLM")(getattr(tf, f"{cls}Config")(**config))


CASES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[nn.Module], torch.Tensor]]] = {
    "attention": (Reads, "out_proj", lambda model: model(torch.linspace(-1, 1, 48).reshape(2, 3, 8))),
    "siglip's pooling head": (siglip, "out_proj", pictures),
    "mamba": (lambda: mamba("Mamba"), "dt_proj", lambda model: model(input_ids=tokens()).logits),
    "falcon mamba": (lambda: mamba("FalconMamba"), "dt_proj", lambda model: model(input_ids=tokens()).logits),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights_read_without_their_layer_count(case: str, training: bool) -> None:
    make, ending, run = CASES[case]
    torch.manual_seed(0)
    model = make().train(training)
    one = adapter_for(linear_weights(model, ending))
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in one.adapters.items():
            merged.get_parameter(name).add_(20 * torch.from_numpy(delta.dense()))
        base, expected = run(model), run(merged)
        assert far(base, expected) > 1e-4
        with attach(model, LoraStack([(one, 20.0)])) as handle:
            assert handle.unused().modules == tuple(one.adapters)
            assert far(run(model), expected) < 1e-5
            assert not handle.unused()
        assert torch.equal(run(model), base)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_handle_names_what_no_pass_came_to(compiled: bool) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)
            self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(6, 6)}) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0]["w1"](self.used(x))

    torch._dynamo.reset()
    model = Idle()
    names = ["used", "idle", "experts.0.w1", "experts.1.w1"]
    wrapped = nn.ModuleDict({"layer": model})
    one = adapter_for({f"layer.{name}.weight": (6, 6) for name in names})
    with attach(wrapped, one) as handle, torch.no_grad():
        live = torch.compile(model, backend="eager") if compiled else model
        live(torch.randn(2, 6))
        unused = handle.unused()
        assert unused.modules == ("layer.idle.weight",)
        assert unused.experts == ("layer.experts.1.w1.weight",)
        assert str(unused) == (
            "1 weights had no effect, such as layer.idle.weight: no pass came there; "
            "1 weights are of experts that no token was sent to"
        )


def test_nothing_is_unused_where_all_is_used() -> None:
    model = made("qwen2")
    with attach(model, adapter_for(linear_weights(model, "proj"))) as handle:
        logits(model)
        assert not handle.unused()
