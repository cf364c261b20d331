"""Ways that are asked for by name: never another answer, said by the plan, and `fast` by the batch."""

from __future__ import annotations

import os
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import STRICT

if find_spec("triton") is None and not STRICT:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made

from lorastack import LoadedLora, LoraStack
from lorastack.errors import ArgumentError, UnsupportedError
from lorastack.torch import attach
from lorastack.torch.ways import kernels
from lorastack.torch.ways.pages import PAGES
from tests.torch.test_ways import RANKS, expected, one_layer, random_lora
from tests.torch.tiny import ARCHITECTURES, far, make_model, save_adapter, tokens

NAMES = ("dense", "each", "fast", "pages")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


mixture = st.dictionaries(
    st.sampled_from([f"a{n}" for n in range(len(RANKS))]), st.sampled_from([-1.5, 0.0, 0.25, 1.0]), max_size=4
)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("way", NAMES)
def test_whatever_the_way_the_sum_is_that_in_float64(way: str, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if paged:
        monkeypatch.setattr("lorastack.torch.ways.choice.own", lambda layer: PAGES)
    model, handle, loras = one_layer()

    @settings(max_examples=10, deadline=None)
    @given(st.lists(mixture, min_size=1, max_size=6), st.sampled_from([1, 3]), st.booleans())
    def check(mixtures: list[dict[str, float]], length: int, packed: bool) -> None:
        x = torch.randn(len(mixtures), length, 24, generator=torch.Generator().manual_seed(1))
        index = torch.arange(len(mixtures)).repeat_interleave(length) if packed else None
        with handle.rows(mixtures, way=way, index=index):
            found = model(x.reshape(1, -1, 24) if packed else x).view(len(mixtures), length, -1)
            taken = handle.current().ways
        assert far(found.double(), expected(model, loras, x, mixtures)) < 1e-5
        assert taken.keys() == {"0.weight"}
        assert taken["0.weight"] in (NAMES if way == "fast" else (way,))

    check()


def test_fast_looks_at_the_batch_on_a_cpu() -> None:
    """In a narrow layer 32 rows of three adapters each are many products, four of one adapter are one."""
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    loras = [random_lora(n, 16, (512, 512)) for n in range(16)]
    rng = np.random.default_rng(0)
    many = [{f"a{n}": 0.5 for n in rng.choice(16, 3, replace=False)} for _ in range(32)]
    seen = {}
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle:
        for mixtures in (many, [{"a3": 1.0}] * 4):
            x = torch.randn(len(mixtures), 512)
            with handle.rows(mixtures, way="fast"):
                assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5
                seen[len(mixtures)] = handle.current().ways["0.weight"]
            with handle.rows(mixtures):
                model(x)
                assert handle.current().ways == {"0.weight": "each"}
    assert seen == {32: "dense", 4: "each"}


def test_fast_looks_at_the_batch_where_there_are_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorastack.torch.ways.choice.own", lambda layer: PAGES)
    model, handle, loras = one_layer((4, 16, 3))
    one, all_three = {"a0": 1.0}, {"a0": 1.0, "a1": -1.0, "a2": 0.5}
    for mixtures, way in (([one] * 8, "pages"), ([{**all_three, "a0": 0.1 * n} for n in range(1, 9)], "pages")):
        x = torch.randn(8, 24)
        with handle.rows(mixtures, way="fast"):
            assert far(model(x).double(), expected(model, loras, x, mixtures)) < 1e-5
            assert handle.current().ways == {"0.weight": way}
    sets: list[dict[str, float]] = [{"a0": 1.0}, {"a1": 1.0}, {"a2": 1.0}, {"a0": 1.0, "a1": 1.0}, all_three]
    x = torch.randn(5, 24)
    with handle.rows(sets, way="fast"):  # 8 pages of tiles, of 3 pages there are
        assert far(model(x).double(), expected(model, loras, x, sets)) < 1e-5
        assert handle.current().ways == {"0.weight": "dense"}


def test_a_name_that_no_way_has_is_an_error_that_lists_them() -> None:
    _, handle, _ = one_layer()
    said = re.escape("no way is named 'page'; there are dense, each, fast, pages")
    with pytest.raises(ArgumentError, match=said), handle.rows([{}], way="page"):
        pass


def test_pages_without_what_they_need_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    model, handle, _ = one_layer()
    said = "pages need a CUDA device and layers of 32 bits or fewer; leave way= out"
    with pytest.raises(UnsupportedError, match=said), handle.rows([{}], way="pages"):
        pass
    with handle.rows([{}], way="fast"):
        model(torch.randn(1, 24))
        assert handle.current().ways["0.weight"] in ("dense", "each")


@pytest.mark.parametrize("way", NAMES)
def test_what_has_no_way_keeps_its_own(way: str, tmp_path: Path) -> None:
    """NaN that was let in, DoRA, convolutions and embeddings."""
    model, handle, loras = one_layer((3, 17, 16))
    bad = {"0.weight": (np.full((2, 24), np.nan, np.float32), np.full((20, 2), np.inf, np.float32))}
    handle.push(LoadedLora.from_tensors(bad, name="nan", allow_nonfinite=True))
    x, mixtures = torch.randn(3, 24), [{"nan": 1.0}, {"a1": -0.5}, {}]
    with handle.rows(mixtures, way=way):
        found = model(x)
    assert found[0].isnan().any()
    assert far(found[1:].double(), expected(model, loras, x[1:], mixtures[1:])) < 1e-5
    for name in ("llama", "convnet"):
        model = make_model(name)
        targets = ARCHITECTURES[name][1]
        folder = save_adapter(model, tmp_path / name, target_modules=targets, use_dora=True)
        inputs = {key: value.repeat(3, *[1] * (value.dim() - 1)) for key, value in ARCHITECTURES[name][2]().items()}
        with attach(model, LoadedLora.load(folder)) as handle:
            seen = []
            for asked in (None, way):
                with handle.rows([{handle.names[0]: 0.1 * n} for n in range(6)], way=asked):
                    out = model(**inputs)
                    seen.append(getattr(out, "logits", out))
            assert torch.equal(*seen)


def test_a_plan_is_written_again_in_every_way() -> None:
    model, handle, loras = one_layer()
    x = torch.randn(3, 24)
    for way in NAMES:
        with handle.rows([{"a0": 1.0}, {}, {"a1": 1.0}], way=way):
            model(x)
            others: list[dict[str, float]] = [{}, {"a4": 0.5, "a2": -1.0}, {"a3": 1.0}]
            handle.current().write(others)
            assert far(model(x).double(), expected(model, loras, x, others)) < 1e-5, way


def test_a_model_generates_the_same_in_every_way(tmp_path: Path) -> None:
    model = make_model("llama")
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    three = [
        LoadedLora.load(save_adapter(model, tmp_path / f"a{n}", seed=n, r=2 + n, target_modules=targets))
        for n in range(3)
    ]
    ids, mixtures = tokens(3, 5), [{"a0": 1.0}, {"a1": 0.5, "a2": 0.5}, {}]
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle:
        found = []
        for way in (None, *NAMES):
            with handle.rows(mixtures, way=way):
                found.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert all(torch.equal(one, found[0]) for one in found)


def test_gradients_go_through_dense_products_whatever_was_asked() -> None:
    model, handle, loras = one_layer()
    x, mixtures = torch.randn(2, 24), [{"a0": 1.0}, {"a1": 0.5, "a4": -1.0}]
    grads = []
    for way in (None, *NAMES):
        given = x.clone().requires_grad_()
        with torch.enable_grad(), handle.rows(mixtures, way=way):
            model(given).square().sum().backward()
            assert handle.current().ways == {"0.weight": "dense"}
            with torch.no_grad():
                model(x)
            assert handle.current().ways["0.weight"] == {None: "each", "fast": "dense"}.get(way, way)
        grads.append(given.grad)
    exact = x.double().requires_grad_()
    with torch.enable_grad():
        expected(model, loras, exact, mixtures).square().sum().backward()
    assert all(far(grad.double(), exact.grad) < 1e-5 for grad in grads)


class Noted(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class NotLaunched:
    """A kernel that is not launched: the interpreter copies what it is given."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", NAMES)
def test_a_new_composition_is_copied_once_and_no_layer_waits_for_a_number(
    way: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shrink", "expand"):
        monkeypatch.setattr(kernels, name, NotLaunched())
    torch.manual_seed(0)
    model, rng = nn.Sequential(*[nn.Linear(24, 24) for _ in range(4)]).eval(), np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors(
            {f"{n}.weight": (rng.standard_normal((20, 24)), rng.standard_normal((24, 20))) for n in range(4)}, name=name
        )
        for name in ("a0", "a1")
    ]
    index = torch.tensor([0, 1, 0]) if packed else None
    x = torch.randn(1, 3, 24) if packed else torch.randn(2, 24)
    with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle:
        with handle.rows([{"a0": 1.0}, {}], index=index, way=way):
            model(x)
        with handle.rows([{"a1": 1.0}, {"a0": 1.0, "a1": -1.0}], index=index, way=way), Noted() as noted:
            model(x)
            first = noted.seen.copy()
            noted.seen.clear()
            model(x)
    assert not any("_local_scalar_dense" in name for name in noted.seen)
    assert not any("_to_copy" in name or "aten.copy_" in name for name in noted.seen)
    if way == "pages":
        assert first["aten.copy_.default"] == 1
