"""The page kernels in Triton's interpreter: random compositions against the dense sum in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
from lorastack.errors import ArgumentError
from lorastack.torch import Handle, attach
from lorastack.torch.ways.board import TILE, Board
from lorastack.torch.ways.pages import PAGES, launch
from tests.torch.test_ways import One, expected, random_lora
from tests.torch.tiny import far

RANKS = (1, 16, 17, 40)


@pytest.fixture(autouse=True)
def by_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lorastack.torch.layer.LiveLayer._way", lambda self: PAGES)
    with torch.no_grad():
        yield


def layer(shape: tuple[int, int] = (20, 24), ranks: tuple[int, ...] = RANKS) -> tuple[Any, Handle, list[LoadedLora]]:
    torch.manual_seed(0)
    model = One(nn.Linear(shape[1], shape[0])).eval()
    loras = [random_lora(n, rank, shape) for n, rank in enumerate(ranks)]
    return model, attach(model, LoraStack([(lora, 1.0) for lora in loras])), loras


mixture = st.dictionaries(st.sampled_from(["a0", "a1", "a2", "a3"]), st.sampled_from([-1.5, 0.0, 0.25, 1.0]))


def test_random_compositions_are_the_sum_in_float64() -> None:
    model, handle, loras = layer()

    @settings(max_examples=15, deadline=None)
    @given(st.lists(mixture, min_size=1, max_size=5), st.sampled_from([1, 3, 17]), st.booleans())
    def check(mixtures: list[dict[str, float]], tokens: int, packed: bool) -> None:
        x = torch.randn(len(mixtures), tokens, 24, generator=torch.Generator().manual_seed(1))
        wanted = expected(model, loras, x, mixtures)
        if packed:  # token by token in turn
            index = torch.arange(len(mixtures)).repeat(tokens)
            with handle.rows(mixtures, index=index):
                found = model(x.transpose(0, 1).reshape(1, -1, 24)).view(tokens, -1, 20).transpose(0, 1)
        else:
            with handle.rows(mixtures):
                found = model(x)
        assert far(found.double(), wanted) < 1e-5

    check()


def test_sums_in_splits_and_columns_in_blocks() -> None:
    model, handle, loras = layer((150, 1100), (16, 5))
    mixtures: list[dict[str, float]] = [{"a0": 1.0}, {}, {"a1": -0.5, "a0": 0.3}]
    x = torch.randn(3, 1, 1100)
    with handle.rows(mixtures):
        assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_neighbours_nan_stays_there_and_a_row_is_the_same_to_the_bit() -> None:
    model, handle, _ = layer()
    bad = {"0.weight": (np.full((2, 24), np.nan, np.float32), np.full((20, 2), np.inf, np.float32))}
    handle.push(LoadedLora.from_tensors(bad, name="nan", allow_nonfinite=True))
    x = torch.randn(4, 1, 24)
    own = {"a1": 0.7, "a3": -0.3}
    seen = []
    others: list[list[dict[str, float]]] = [
        [{"nan": 1.0}, {"a0": 1.0}, {"nan": 1.0, "a1": 1.0}],
        [{}, {}, {}],
        [own, own, own],
        [{"a3": 2.0, "a1": 1.0}, {"a1": 1.0}, {"a2": 1.0}],
    ]
    for mixtures in others:
        with handle.rows([*mixtures, own]):
            found = model(x)
        seen.append(found[3])
        assert [bool(row.isnan().any()) for row in found] == ["nan" in one for one in [*mixtures, own]]
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_a_board_is_written_again_for_other_compositions_as_a_captured_graph_reads_them() -> None:
    model, handle, loras = layer()
    x, base = torch.randn(6, 24), model[0].bias.detach()
    attached = handle._layers["0.weight"]
    plan = handle._plan([{}] * 6, None, 1)
    numbers = plan.made(handle._assembly.passes.version).numbers
    pages = numbers.of_layer(attached.layout)
    each = np.arange(6)
    board = None
    compositions: list[list[dict[str, float]]] = [
        [{"a0": 1.0}] * 6,
        [{"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}, {"a3": 1.0}, {"a0": 1.0, "a1": 1.0}, {"a1": -1.0, "a0": 2.0}],
        [{}, {"a3": 0.5}, {}, {}, {"a2": 1.0, "a1": 0.25}, {}],
        [{}] * 6,
    ]
    for mixtures in compositions:
        wanted = [[(int(name[1:]), scale) for name, scale in sorted(one.items())] for one in mixtures]
        board = board or Board.for_batch(wanted, each, numbers, x.device)
        board.write(wanted, each, numbers)
        y = (x @ model[0].weight.T + base).clone()
        launch(y, x, attached, board, pages)
        assert far(y.double(), expected(model, loras, x, mixtures)) < 1e-5
    assert board is not None
    assert board.rows.shape == (8 * TILE,)
    with pytest.raises(ArgumentError, match="needs more than 8 tiles of rows and 32 pages of tiles"):
        board.write([[(n, 1.0) for n in range(4) if which >> n & 1] for which in range(1, 10)], np.arange(9), numbers)


def test_layers_that_differ_read_one_board() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8)).eval()
    rng = np.random.default_rng(0)

    def factors(rank: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        out, into = model[n].weight.shape
        return rng.standard_normal((rank, into), np.float32), rng.standard_normal((out, rank), np.float32)

    loras = [
        LoadedLora.from_tensors({"0.weight": factors(40, 0), "1.weight": factors(3, 1)}, name="both"),
        LoadedLora.from_tensors({"1.weight": factors(20, 1)}, alpha=5, name="second"),
    ]
    mixtures = [{"both": 1.0}, {"second": -1.0}, {"both": 0.5, "second": 0.25}]
    x = torch.randn(3, 24)
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle, handle.rows(mixtures):
        found = model(x)
    for row, one in enumerate(mixtures):
        h = x[row].double()
        for n in range(2):
            weight = model[n].weight.detach().double()
            for lora in loras:
                if lora.name in one and f"{n}.weight" in lora.adapters:
                    weight = weight + one[lora.name] * torch.from_numpy(lora.adapters[f"{n}.weight"].dense()).double()
            h = weight @ h + model[n].bias.detach().double()
        assert far(found[row].double(), h) < 1e-5
