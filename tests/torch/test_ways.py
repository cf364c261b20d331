"""Ways to compute rows: the dense sum in float64, the same to the bit whatever the neighbours, few compilations."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from lorastack import LoadedLora, LoraStack
from lorastack.errors import ArgumentError, UnknownNameError
from lorastack.torch import Handle, attach
from lorastack.torch.pool import PAGE
from tests.torch.tiny import far

N_IN, N_OUT = 24, 20
RANKS = (1, 16, 3, 17, 40, 5)


class One(nn.Sequential):
    """A layer whose call is no code of torch's own, which would be compiled together with the hooks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)


def random_lora(seed: int, rank: int, shape: tuple[int, int] = (N_OUT, N_IN)) -> LoadedLora:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((rank, shape[1]), np.float32), rng.standard_normal((shape[0], rank), np.float32)
    return LoadedLora.from_tensors({"0.weight": factors}, alpha=rank / 2 + seed, name=f"a{seed}", naming="hf")


def one_layer(ranks: tuple[int, ...] = RANKS) -> tuple[Any, Handle, list[LoadedLora]]:
    torch.manual_seed(0)
    model = One(nn.Linear(N_IN, N_OUT)).eval()
    loras = [random_lora(n, rank) for n, rank in enumerate(ranks)]
    return model, attach(model, LoraStack([(lora, 1.0) for lora in loras])), loras


def expected(model: Any, loras: list[LoadedLora], x: torch.Tensor, mixtures: list[dict[str, float]]) -> torch.Tensor:
    """Each row's sum, dense, in float64."""
    weight, rows = model[0].weight.detach().double(), []
    deltas = {lora.name: torch.from_numpy(lora.adapters["0.weight"].dense()).double() for lora in loras}
    for row, mixture in zip(x.double(), mixtures, strict=True):
        own = weight + sum((scale * deltas[name] for name, scale in mixture.items()), torch.zeros_like(weight))
        rows.append(row @ own.T + model[0].bias.detach().double())
    return torch.stack(rows)


mixture = st.dictionaries(
    st.sampled_from([f"a{n}" for n in range(len(RANKS))]), st.sampled_from([-1.5, 0.0, 0.25, 1.0]), max_size=4
)


@pytest.mark.parametrize("ranks", [0, 10**9])
@pytest.mark.parametrize("own", [RANKS, (4,) * 6])  # adapters of one rank are multiplied together
def test_random_compositions_are_the_sum_in_float64(
    own: tuple[int, ...], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorastack.torch.layer.DENSE_RANKS", ranks)
    model, handle, loras = one_layer(own)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(mixture, min_size=1, max_size=9), st.sampled_from([(), (1,), (3,), (2, 2)]))
    def check(mixtures: list[dict[str, float]], tokens: tuple[int, ...]) -> None:
        x = torch.randn(len(mixtures), *tokens, N_IN, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), handle.rows(mixtures):
            found = model(x)
        assert far(found.double(), expected(model, loras, x, mixtures)) < 1e-5

    check()


@pytest.mark.parametrize("ranks", [0, 10**9])
def test_random_packed_compositions_are_the_sum_in_float64(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorastack.torch.layer.DENSE_RANKS", ranks)
    model, handle, loras = one_layer()

    @settings(max_examples=40, deadline=None)
    @given(st.lists(mixture, min_size=1, max_size=5), st.data())
    def check(mixtures: list[dict[str, float]], data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, len(mixtures) - 1), min_size=1, max_size=12))
        x = torch.randn(len(index), N_IN, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), handle.rows(mixtures, index=index):
            found = model(x[None])[0]
        assert far(found.double(), expected(model, loras, x, [mixtures[n] for n in index])) < 1e-5

    check()


@pytest.mark.parametrize("tokens", [(), (1,), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [0, 10**9])
def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours(
    ranks: int, dtype: torch.dtype, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorastack.torch.layer.DENSE_RANKS", ranks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80)).to(dtype).eval()
    loras = [random_lora(n, rank, (80, 96)) for n, rank in enumerate((16, 16, 16, 5, 40))]
    loras.append(LoadedLora.from_tensors(
        {"0.weight": (np.full((2, 96), np.nan, np.float32), np.full((80, 2), np.inf, np.float32))},
        name="nan", allow_nonfinite=True,
    ))  # fmt: skip
    rng = np.random.default_rng(0)
    names = [lora.name for lora in loras]
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle, torch.no_grad():
        x = torch.randn(9, *tokens, 96).to(dtype)
        own = {"a1": 0.7, "a4": -0.3}
        seen = []
        for _ in range(12):
            mixtures = [{name: float(rng.normal()) for name in rng.choice(names, rng.integers(0, 4))} for _ in x]
            mixtures[4] = own
            with handle.rows(mixtures):
                seen.append(model(x)[4])
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert not seen[0].isnan().any()


def test_pages_stay_where_they_are_and_are_filled_again() -> None:
    model, handle, loras = one_layer((3, 17, 16))
    x = torch.randn(2, N_IN)

    def holds(mixtures: list[dict[str, float]]) -> None:
        with torch.no_grad(), handle.rows(mixtures):
            assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5

    holds([{"a0": 1.0}, {"a1": -1.0, "a2": 0.5}])
    pool = handle._layers["0.weight"].pool
    assert pool.a.shape == (4, PAGE, N_IN)
    memory = pool.a.data_ptr(), pool.b.data_ptr()
    handle.remove("a1")
    loras[1] = random_lora(1, 30)
    handle.push(loras[1])
    holds([{"a2": 2.0}, {"a1": 1.0, "a0": 0.5}])
    assert (pool.a.data_ptr(), pool.b.data_ptr()) == memory, "30 ranks go into the two pages that 17 left"
    loras.append(random_lora(3, 1))
    handle.push(loras[3])
    holds([{"a3": 2.0}, {"a1": 1.0, "a3": 0.5}])
    assert pool.used == 5
    handle.remove("a0")
    broken = LoadedLora.from_tensors({"0.weight": (np.ones((1, 3)), np.ones((2, 1)))}, name="broken")
    with pytest.raises(Exception, match="broken"):
        handle.replace("a2", broken)
    holds([{"a3": 2.0}, {"a1": 1.0, "a2": 0.5}])


def test_layers_alike_share_what_a_composition_comes_to() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).eval()
    rng = np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors(
            {f"{n}.weight": (rng.standard_normal((2, 8)), rng.standard_normal((8, 2))) for n in range(6)}, name=name
        )
        for name in "abc"
    ]
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle, torch.no_grad():
        with handle.rows([{"a": 1.0}, {"b": 1.0}]):
            model(torch.randn(2, 8))
        assert len(handle._assembly.layouts()) == 1


def test_twenty_compositions_and_nine_threads_compile_at_most_twice() -> None:
    torch._dynamo.reset()
    model, handle, loras = one_layer((3, 17, 16))
    counter = CompileCounter()
    live = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, N_IN)
    rng = np.random.default_rng(0)

    def composition() -> list[dict[str, float]]:
        return [{f"a{n}": float(rng.normal()) for n in rng.choice(3, rng.integers(0, 4))} for _ in range(4)]

    def holds(mixtures: list[dict[str, float]]) -> bool:
        with torch.no_grad(), handle.rows(mixtures):
            return far(live(x).double(), expected(model, loras, x, mixtures)) < 1e-5

    assert all(holds(composition()) for _ in range(20))
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(9) as pool:
            assert all(pool.map(holds, [composition() for _ in range(36)]))
    finally:
        sys.setswitchinterval(5e-3)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("ranks", [0, 10**9])
def test_a_plan_is_written_again_in_the_same_memory(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorastack.torch.layer.DENSE_RANKS", ranks)
    model, handle, loras = one_layer()
    x = torch.randn(3, N_IN)
    with handle.rows([{"a0": 1.0}, {}, {"a1": 1.0}]), torch.no_grad():
        plan = handle.current()
        model(x)
        layout = handle._layers["0.weight"].layout
        made = plan.made(handle._assembly.passes.version)
        memory = made.tiles(layout).scales
        others = [{}, {"a4": 0.5, "a2": -1.0, "a0": 0.25}, {"a3": 1.0}]
        plan.write(others)
        assert far(model(x).double(), expected(model, loras, x, others)) < 1e-5
        assert made.tiles(layout).scales is memory
        with pytest.raises(ArgumentError, match="the plan has 3 rows, and 2 mixtures were given; make another plan"):
            plan.write(others[:2])
        with pytest.raises(UnknownNameError, match="no adapter is named zara"):
            plan.write([{"zara": 1.0}, {}, {}])
        assert far(model(x).double(), expected(model, loras, x, others)) < 1e-5
    with pytest.raises(ArgumentError, match="the plan has no rows"):
        handle.plain().write(others)
