"""One shrink for the layers that share an input, in Triton's interpreter: against float64, and only where they do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import STRICT

if find_spec("triton") is None and not STRICT:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made

from lorastack import LoadedLora, LoraStack
from lorastack.torch import Handle, attach
from lorastack.torch.ways import kernels, pages
from tests.torch.tiny import GROUPED, far, tokens

HIDDEN = 24
OUT = {"q": 20, "k": 12, "v": 8, "gate": 9, "up": 17}
RANKS = (3, 16, 20)
NAMES = [f"a{n}" for n in range(len(RANKS))]


class Shared(nn.Module):
    """Layers side by side; ``between`` is called before each with the input, and gives the layer's own."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in OUT.items():
            self.add_module(name, nn.Linear(HIDDEN, out))

    def forward(self, x: torch.Tensor, between: Callable[[str, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [layer(between(name, x)) for name, layer in self.named_children()]


def same(name: str, x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.fixture(autouse=True)
def by_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lorastack.torch.ways.choice.own", lambda layer: pages.PAGES)
    with torch.no_grad():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each shrink was for."""
    seen: list[int] = []
    launched = pages.shrink

    def noted(x: Any, factors: Any, *rest: Any) -> Any:
        seen.append(len(factors))
        return launched(x, factors, *rest)

    monkeypatch.setattr(pages, "shrink", noted)
    return seen


def attached() -> tuple[Shared, Handle, list[LoadedLora]]:
    torch.manual_seed(0)
    model, rng = Shared().eval(), np.random.default_rng(0)
    loras = []
    for name, rank in zip(NAMES, RANKS, strict=True):
        factors = {
            f"{layer}.weight": (rng.standard_normal((rank, HIDDEN)), rng.standard_normal((out, rank)))
            for layer, out in OUT.items()
            if (name, layer) != ("a1", "v")  # layers need not have the same adapters
        }
        loras.append(LoadedLora.from_tensors(factors, alpha=rank / 2, name=name, naming="hf"))
    return model, attach(model, LoraStack([(lora, 1.0) for lora in loras])), loras


def holds(
    model: Shared,
    loras: list[LoadedLora],
    mixtures: list[dict[str, float]],
    inputs: dict[str, torch.Tensor],
    found: Any,
) -> None:
    for (name, layer), y in zip(model.named_children(), found, strict=True):
        for row, mixture in enumerate(mixtures):
            weight = layer.weight.double()
            for lora in loras:
                if lora.name in mixture and f"{name}.weight" in lora.adapters:
                    dense = torch.from_numpy(lora.adapters[f"{name}.weight"].dense()).double()
                    weight = weight + mixture[lora.name] * dense
            wanted = inputs[name][row].double() @ weight.T + layer.bias.double()
            assert far(y[row].double(), wanted) < 1e-5, (name, row)


mixture = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([-1.5, 0.25, 1.0]), max_size=3)


def test_layers_that_share_an_input_have_one_shrink_from_the_second_pass_on(launches: list[int]) -> None:
    model, handle, loras = attached()

    @settings(max_examples=12, deadline=None)
    @given(st.lists(mixture, min_size=1, max_size=5), st.sampled_from([1, 3]))
    def check(mixtures: list[dict[str, float]], length: int) -> None:
        x = torch.randn(len(mixtures), length, HIDDEN, generator=torch.Generator().manual_seed(1))
        with handle.rows(mixtures):
            found = model(x, same)
        holds(model, loras, mixtures, dict.fromkeys(OUT, x), found)

    check()
    assert launches[:5] == [1] * 5, "nothing is foreseen in the first pass"
    assert launches[5:9] == [3, 2, 3, 2]
    assert set(launches[5:]) == {3, 2}


def test_a_shared_shrink_is_the_same_to_the_bit(launches: list[int]) -> None:
    model, handle, _ = attached()
    x, mixtures = torch.randn(3, 1, HIDDEN), [{"a0": 1.0}, {"a1": 0.5, "a2": -1.0}, {}]
    with handle.rows(mixtures):
        first, second = model(x, same), model(x, same)
    assert launches == [1, 1, 1, 1, 1, 3, 2]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def changed(name: str, x: torch.Tensor) -> torch.Tensor:
    return x.add_(1.0) if name == "v" else x


OTHER = torch.randn(3, 1, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda name, x: OTHER if name in "kv" else x, [3, 2, 1, 1]),  # cross-attention; gate and up have q's again
        (lambda name, x: x.clone() if name == "k" else x, [3, 2, 1]),
        (lambda name, x: x.view(3, 1, HIDDEN) if name == "up" else x, [3, 2, 1]),  # another tensor, of the same memory
        (lambda name, x: x[:, :, :] if name in ("gate", "up") else x, [3, 2, 1, 1]),
    ],
)
def test_a_layer_with_another_input_computes_its_own(between: Any, expected: list[int], launches: list[int]) -> None:
    model, handle, loras = attached()
    x, mixtures = torch.randn(3, 1, HIDDEN), [{"a0": 1.0}, {"a1": 0.5, "a2": -1.0}, {}]
    with handle.rows(mixtures):
        model(x, same)
        del launches[:]
        found = model(x, between)
    holds(model, loras, mixtures, {name: between(name, x) for name in OUT}, found)
    assert launches == expected


def test_an_input_that_was_changed_in_place_is_another(launches: list[int]) -> None:
    model, handle, loras = attached()
    x, mixtures = torch.randn(3, 1, HIDDEN), [{"a0": 1.0}, {"a1": 0.5, "a2": -1.0}, {}]
    before, after = x.clone(), x + 1
    with handle.rows(mixtures):
        model(x, same)
        del launches[:]
        found = model(x, changed)
    inputs = {"q": before, "k": before} | dict.fromkeys(("v", "gate", "up"), after)
    holds(model, loras, mixtures, inputs, found)
    assert launches[0] == 3, "q's is k's too"
    assert len(launches) > 2, "v's is its own"


def test_tensors_that_do_not_tell_whether_they_were_changed_are_not_shared(launches: list[int]) -> None:
    model, handle, loras = attached()
    mixtures = [{"a0": 1.0}, {"a1": 0.5, "a2": -1.0}, {}]
    with torch.inference_mode(), handle.rows(mixtures):
        x = torch.randn(3, 1, HIDDEN)
        model(x, same)
        before, after = x.clone(), x + 1
        found = model(x, changed)
    holds(model, loras, mixtures, {"q": before, "k": before} | dict.fromkeys(("v", "gate", "up"), after), found)
    assert set(launches) == {1}


class Latent(nn.Module):
    """Projections as latent attention has them: one of the input, one of what came of it, another of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_b, self.kv_a = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_b(torch.tanh(self.q_a(x))), self.kv_a(x)


def test_latent_attention(launches: list[int]) -> None:
    torch.manual_seed(0)
    model, rng = Latent().eval(), np.random.default_rng(0)
    factors = {f"{n}.weight": rng.standard_normal((2, 4, HIDDEN)).astype(np.float32) for n in ("q_a", "q_b", "kv_a")}
    lora = LoadedLora.from_tensors({name: (a, b.T.copy()) for name, (a, b) in factors.items()}, name="a", naming="hf")
    x = torch.randn(2, 3, HIDDEN)

    def product(name: str, t: torch.Tensor, scale: float) -> torch.Tensor:
        layer, delta = getattr(model, name), torch.from_numpy(lora.adapters[f"{name}.weight"].dense()).double()
        return t @ (layer.weight.double() + scale * delta).T + layer.bias.double()

    with attach(model, lora) as handle, handle.rows([{"a": 1.0}, {"a": -0.5}]):
        for _ in range(3):
            q, kv = model(x)
            for row, scale in enumerate((1.0, -0.5)):
                wanted = product("q_b", torch.tanh(product("q_a", x[row].double(), scale)), scale)
                assert far(q[row].double(), wanted) < 1e-5
                assert far(kv[row].double(), product("kv_a", x[row].double(), scale)) < 1e-5
    assert launches == [1, 1, 1, 2, 1, 2, 1]


def test_adapters_that_come_and_go_are_foreseen_anew(launches: list[int]) -> None:
    model, handle, loras = attached()
    x, mixtures = torch.randn(2, 1, HIDDEN), [{"a0": 1.0}, {"a2": -1.0}]
    with handle.rows(mixtures):
        model(x, same)
    handle.remove("a1")
    del launches[:]
    for _ in range(2):
        with handle.rows(mixtures):
            holds(model, loras, mixtures, dict.fromkeys(OUT, x), model(x, same))
    assert launches == [1, 1, 1, 1, 1, 3, 2]


class Recorded:
    """A kernel whose launches are noted, to be made again with the same tensors, as a captured graph is replayed."""

    def __init__(self, kernel: Any, tape: list[Callable[[], None]]) -> None:
        self.kernel, self.tape = kernel, tape

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.tape.append(lambda: self.kernel[grid](*args, **options))
            self.tape[-1]()

        return launch


def test_what_was_launched_is_right_for_another_composition_written_in_its_place(monkeypatch: Any) -> None:
    model, handle, loras = attached()
    x = torch.randn(4, 1, HIDDEN)
    tape: list[Callable[[], None]] = []
    with handle.rows([{"a0": 1.0}] * 4):
        model(x, same)
        for name in ("shrink", "expand"):
            monkeypatch.setattr(kernels, name, Recorded(getattr(kernels, name), tape))
        found = model(x, same)
        assert len(tape) == 2 + 5
        others = [
            [{}, {"a1": 0.5, "a2": -1.0, "a0": 2.0}, {"a1": 1.0}, {"a2": 1.0}],
            [{"a2": 1.0}, {}, {}, {"a2": -1.0}],
            [{}, {}, {}, {}],
        ]
        for mixtures in others:
            handle.current().write(mixtures)
            for layer, y in zip(model.children(), found, strict=True):
                y.copy_(x @ layer.weight.T + layer.bias)
            for launch in tape:
                launch()
            holds(model, loras, mixtures, dict.fromkeys(OUT, x), found)


def test_a_model_of_transformers(launches: list[int]) -> None:
    import transformers as tf

    from tests.torch.families import adapter_for, linear_weights

    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    weights = {
        name: shape
        for end in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for name, shape in linear_weights(model, end).items()
    }
    loras = [adapter_for(weights, seed=n).renamed(name) for n, name in enumerate(NAMES)]
    ids, mixtures = tokens(3, 4), [{"a0": 1.0}, {"a1": 0.5, "a2": -1.0}, {}]
    layers = model.config.num_hidden_layers
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle:
        with handle.rows(mixtures, way="dense"):
            wanted = model(input_ids=ids).logits
        with handle.rows(mixtures):
            for _ in range(2):
                del launches[:]
                assert far(model(input_ids=ids).logits, wanted) < 1e-5
    assert launches == [3, 1, 2, 1] * layers, "q, k and v; o; gate and up; down"
