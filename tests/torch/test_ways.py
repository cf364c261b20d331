"""Ways to compute rows: the dense sum in float64, the same to the bit whatever the neighbours, few compilations."""

from __future__ import annotations

import gc
import sys
import types
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
    monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
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
    monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
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
    monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
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


def test_factors_stay_where_they_are_and_free_ranks_are_filled_again() -> None:
    model, handle, loras = one_layer((3, 17, 16))
    x = torch.randn(2, N_IN)
    layer = handle._layers["0.weight"]

    def holds(mixtures: list[dict[str, float]]) -> None:
        mean = {lora.name: handle.scales[lora.name] for lora in loras if lora.name in handle.scales}
        with torch.no_grad():
            assert far(model(x).double(), expected(model, loras, x, [mean] * 2)) < 1e-5
            with handle.rows(mixtures):
                assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5

    def spans() -> dict[int, tuple[int, int]]:
        return {slot.entry: (slot.first, slot.rank) for slot in layer.slots}

    holds([{"a0": 1.0}, {"a1": -1.0, "a2": 0.5}])
    assert (layer.a.shape, layer.b.shape) == ((36, N_IN), (36, N_OUT))
    memory = layer.a.data_ptr(), layer.b.data_ptr()
    handle.remove("a1")
    holds([{"a0": 1.0}, {"a2": 0.5}])
    assert spans() == {0: (0, 3), 1: (20, 16)}
    loras[1] = random_lora(1, 14)
    handle.push(loras[1])
    holds([{"a2": 2.0}, {"a1": 1.0, "a0": 0.5}])
    assert spans() == {0: (0, 3), 1: (20, 16), 2: (3, 14)}, "14 ranks go where 17 were"
    assert (layer.a.data_ptr(), layer.b.data_ptr()) == memory
    loras.append(random_lora(3, 1))
    handle.push(loras[3])
    holds([{"a3": 2.0}, {"a1": 1.0, "a3": 0.5}])
    assert spans()[3] == (17, 1)
    broken = LoadedLora.from_tensors({"0.weight": (np.ones((1, 3)), np.ones((2, 1)))}, name="broken")
    with pytest.raises(Exception, match="broken"):
        handle.replace("a2", broken)
    holds([{"a3": 2.0}, {"a1": 1.0, "a2": 0.5}])
    handle.remove("a2")
    assert (len(layer.a), layer.a.data_ptr()) == (18, memory[0]), "what lies behind the last adapter is not computed"
    loras[2] = random_lora(2, 40)
    handle.push(loras[2])
    holds([{"a3": 2.0, "a2": -1.0}, {"a1": 1.0, "a0": 0.5}])


def test_what_was_freed_is_no_longer_there_even_if_it_was_nan_or_grows_to_infinity() -> None:
    model, handle, loras = one_layer((3, 4, 5))
    bad = np.full((2, N_IN), np.nan, np.float32), np.full((N_OUT, 2), np.inf, np.float32)
    for factors in (bad, (np.full((2, N_IN), 3e38, np.float32), np.full((N_OUT, 2), 3e38, np.float32))):
        handle.push(LoadedLora.from_tensors({"0.weight": factors}, name="bad", allow_nonfinite=True))
        handle.push(random_lora(9, 3))
        handle.remove("bad")
        x, own = torch.randn(2, N_IN), {"a0": 1.0, "a1": 1.0, "a2": 1.0, "a9": 1.0}
        with torch.no_grad():
            assert far(model(x).double(), expected(model, [*loras, random_lora(9, 3)], x, [own] * 2)) < 1e-5
        handle.remove("a9")


def factor_bytes(loras: list[LoadedLora], itemsize: int) -> int:
    return sum(f.shape[0] * f.shape[1] for lora in loras for d in lora.adapters.values() for f in d.factors) * itemsize


def storages_of(*roots: Any) -> int:
    """Bytes of all tensors that are reached from these, without the model's own modules."""
    seen: set[int] = set()
    found: dict[int, int] = {}
    left = list(roots)
    plain = (type, types.ModuleType, types.FunctionType, types.FrameType, nn.Module)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, plain):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            continue
        left += gc.get_referents(one)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4,) * 6, (3, 16, 33), (16,) * 5])
def test_factors_are_held_once_whoever_reads_them(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (512, 768)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype).eval()
    loras = [random_lora(n, rank, shape) for n, rank in enumerate(ranks)]
    own = factor_bytes(loras, dtype.itemsize)
    x = torch.randn(4, shape[1]).to(dtype)
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle, torch.no_grad():
        model(x)
        with handle.rows([{"a0": 1.0}, {}, {"a1": 1.0, "a2": 0.5}, {"a2": 1.0}]):
            model(x)
            plan = handle.current()
            assert own <= storages_of(handle, plan) <= 1.1 * own
        assert handle.report.nbytes == own
        handle.remove("a0")
        with handle.rows([{"a1": 1.0}] * 4):
            model(x)
            assert storages_of(handle) <= 1.1 * own, "what was removed is not kept beside the others"


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
    monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
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
