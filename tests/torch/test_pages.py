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
from lorastack.torch.tensors import to_torch
from lorastack.torch.ways.board import Board
from lorastack.torch.ways.launch import expand, shrink
from lorastack.torch.ways.pages import PAGES
from tests.torch.test_ways import One, expected, random_lora
from tests.torch.tiny import far

RANKS = (1, 16, 17, 40)


@pytest.fixture(autouse=True)
def by_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lorastack.torch.ways.choice.own", lambda layer: PAGES)
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
    boards: tuple[Board, ...] = ()
    compositions: list[list[dict[str, float]]] = [
        [{"a0": 1.0}] * 6,
        [{"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}, {"a3": 1.0}, {"a0": 1.0, "a1": 1.0}, {"a1": -1.0, "a0": 2.0}],
        [{}, {"a3": 0.5}, {}, {}, {"a2": 1.0, "a1": 0.25}, {}],
        [{}] * 6,
    ]
    for mixtures in compositions:
        wanted = [[(int(name[1:]), scale) for name, scale in sorted(one.items())] for one in mixtures]
        boards = boards or Board.for_batch(wanted, each, numbers, x.device)
        for board in boards:
            board.write(wanted, each, numbers)
        y = (x @ model[0].weight.T + base).clone()
        for board in boards:
            (part,) = shrink(x, [attached.a], [pages], board.arrays)
            expand(y, 24, attached.b, part, pages, board.arrays)
        assert far(y.double(), expected(model, loras, x, mixtures)) < 1e-5
    (board,) = boards
    assert board.arrays.rows.shape == (8 * 16,)
    with pytest.raises(ArgumentError, match="needs more than 8 tiles of rows and 32 pages of tiles"):
        board.write([[(n, 1.0) for n in range(4) if which >> n & 1] for which in range(1, 10)], np.arange(9), numbers)


def tiles_of(handle: Handle) -> dict[int, int]:
    """Rows of a tile -> tiles that are filled, of the plan's only shape of batch."""
    made = handle.current().made(handle._assembly.passes.version)
    (boards,) = made._boards.values()
    return {board.tile: int((board.arrays.tile_n > 0).sum()) for board in boards}


@pytest.mark.parametrize("tokens", [63, 64, 520])
def test_rows_of_many_tokens_have_larger_tiles(tokens: int) -> None:
    model, handle, loras = layer(ranks=(16, 5))
    x = torch.randn(2, tokens, 24)
    mixtures: list[dict[str, float]] = [{"a0": 1.0}, {"a1": -0.5, "a0": 0.3}]
    with handle.rows(mixtures):
        assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5
        assert tiles_of(handle) == {63: {16: 8}, 64: {64: 2}, 520: {128: 10}}[tokens]


def test_a_rows_tiles_depend_on_its_own_tokens_and_its_bits_on_no_neighbours() -> None:
    model, handle, loras = layer(ranks=(16, 5, 40))
    own = {"a1": 0.7, "a2": -0.3}
    x = torch.randn(70, 24)
    seen = []
    others: list[tuple[list[int], list[dict[str, float]], dict[int, int]]] = [
        ([1, 1], [{"a0": 1.0}, own], {16: 2, 64: 2}),
        ([70, 3], [own, {}], {16: 0, 64: 3}),
        ([530, 66], [{"a2": 1.0}, {"a1": 1.0}], {64: 4, 128: 5}),
    ]
    for lengths, mixtures, tiles in others:
        packed = torch.randn(sum(lengths) + 70, 24)
        packed[lengths[0] : lengths[0] + 70] = x  # between the others
        index = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([lengths[0], 70, lengths[1]]))
        rows = [mixtures[0], own, mixtures[1]]
        with handle.rows(rows, index=index):
            found = model(packed[None])[0]
            assert tiles_of(handle) == tiles
        assert far(found.double(), expected(model, loras, packed, [rows[n] for n in index.tolist()])) < 1e-5
        seen.append(found[lengths[0] : lengths[0] + 70])
    assert all(torch.equal(one, seen[0]) for one in seen)


@pytest.fixture
def true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16's bits as integers, and cuts numbers off where GPUs round: do as these do."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    cast, dot = Builder.cast_impl, Builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def own_cast(self: Any, handle: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and handle.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.array(handle.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        both = (handle.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32)
        return wide(handle) if both else cast(self, handle, dtype)

    monkeypatch.setattr(Builder, "cast_impl", own_cast)
    monkeypatch.setattr(Builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))


@pytest.mark.usefixtures("true_bfloat16")
def test_in_bfloat16_the_error_is_at_most_pefts() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    shape, rows = (96, 160), 6
    base = nn.Sequential(nn.Linear(shape[1], shape[0])).to(torch.bfloat16).eval()
    loras = [random_lora(n, 16, shape) for n in range(3)]
    x = torch.randn(rows, 5, shape[1]).to(torch.bfloat16)
    names = [f"a{n % 3}" for n in range(rows)]
    exact = expected(base, loras, x, [{name: 1.0} for name in names])
    with attach(base, LoraStack([(lora, 1.0) for lora in loras])) as handle, handle.rows([{n: 1.0} for n in names]):
        ours = base(x)
    config = {
        lora.name: peft.LoraConfig(r=16, lora_alpha=lora.alpha, target_modules=["0"], init_lora_weights=False)
        for lora in loras
    }
    theirs = peft.get_peft_model(base, config["a0"], adapter_name="a0").eval()
    for name in ("a1", "a2"):
        theirs.add_adapter(name, config[name])
    wrapped = theirs.base_model.model[0]
    for lora in loras:
        delta = lora.adapters["0.weight"]
        assert wrapped.scaling[lora.name] == delta.scaling
        for module, factor in zip((wrapped.lora_A, wrapped.lora_B), delta.factors, strict=True):
            module[lora.name].to(torch.bfloat16).weight.data.copy_(to_torch(factor, torch.bfloat16, x.device))
    found = theirs(x, adapter_names=names)
    assert 1e-4 < far(ours.double(), exact) <= far(found.double(), exact)


def compiled_ops(live: Any) -> tuple[Any, list[list[str]]]:
    """``live`` compiled without a break, and the operators of each graph that comes of it."""
    graphs: list[list[str]] = []

    def note(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    return torch.compile(live, backend=note, fullgraph=True), graphs


def test_compiled_code_has_the_kernels_and_compositions_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    model, handle, loras = layer((20, 24), (3, 17, 16, 40))
    live, graphs = compiled_ops(model)
    rng = np.random.default_rng(0)
    x = torch.randn(4, 24)
    for _ in range(20):
        mixtures = [{f"a{n}": float(rng.normal()) for n in rng.choice(3, rng.integers(0, 4))} for _ in range(4)]
        with handle.rows(mixtures):
            assert far(live(x).double(), expected(model, loras, x, mixtures)) < 1e-5
            plan = handle.current()
            others: list[dict[str, float]] = [{"a2": 1.0}, {}, {"a0": 0.5, "a1": -1.0}, {"a3": 1.0}]
            plan.write(others)
            assert far(live(x).double(), expected(model, loras, x, others)) < 1e-5
    assert len(graphs) == 1
    assert [op for op in graphs[0] if "lorastack" in op] == ["lorastack.add_pages.default"]
    torch._dynamo.reset()


class Channels(nn.Module):
    """A layer that sees other numbers of tokens than the batch tells."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, 24))


def test_compiled_code_whose_tokens_were_not_foreseen_is_dense() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Channels().eval()
    rng = np.random.default_rng(0)
    factors = {"linear.weight": (rng.standard_normal((5, 24)), rng.standard_normal((20, 5)))}
    lora = LoadedLora.from_tensors(factors, name="a0", naming="hf")
    x = torch.randn(2, 3, 8, 24)
    with attach(model, lora) as handle:
        with handle.rows([{"a0": 1.0}, {}]):
            wanted = model(x)
        live, graphs = compiled_ops(model)
        with handle.rows([{"a0": 1.0}, {}]):
            assert far(live(x), wanted) < 1e-5
    assert not any("lorastack" in op for ops in graphs for op in ops)
    torch._dynamo.reset()


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
