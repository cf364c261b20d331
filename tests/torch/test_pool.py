"""The memory of a layer's factors: whatever comes and goes, sums are those in float64, and nobody's ranks are 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack import LoadedLora
from lorastack.errors import LoraStackError
from lorastack.torch import Handle
from lorastack.torch.pool import Pool, Span
from tests.torch.test_ways import N_IN, expected, one_layer, random_lora
from tests.torch.tiny import far

push = st.tuples(st.just("push"), st.sampled_from([1, 3, 16, 17, 40]))
other = st.tuples(st.sampled_from(["remove", "replace", "refused"]), st.integers(0, 9))


def step(handle: Handle, there: dict[str, LoadedLora], what: str, number: int, seed: int) -> None:
    """One change of the handle, and of what is expected to be attached."""
    names = list(there)
    if what == "push" or len(names) < 2:
        lora = random_lora(seed, number or 1)
        handle.push(lora)
        there[lora.name] = lora
        return
    name = names[number % len(names)]
    if what == "remove":
        handle.remove(name)
        del there[name]
    elif what == "replace":
        lora = random_lora(seed, 5 + number)
        handle.replace(name, lora)
        del there[name]
        there[lora.name] = lora
    else:
        bad = LoadedLora.from_tensors({"0.weight": (np.ones((1, 3)), np.ones((2, 1)))}, name="bad")
        with pytest.raises(LoraStackError, match="bad"):
            handle.replace(name, bad)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(push, other), min_size=1, max_size=12))
def test_sums_are_right_whatever_comes_and_goes(changes: list[tuple[str, int]]) -> None:
    model, handle, loras = one_layer((3, 17))
    there = {lora.name: lora for lora in loras}
    x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(0))
    layer = handle._layers["0.weight"]
    for seed, (what, number) in enumerate(changes, 10):
        memory = layer.a.data_ptr()
        before = {slot.entry: slot.first for slot in layer.slots}
        step(handle, there, what, number, seed)
        layer = handle._layers["0.weight"]
        held = sorted((slot.first, slot.first + slot.rank) for slot in layer.slots)
        nobodys = torch.ones(len(layer.a), dtype=torch.bool)
        end = 0
        for first, stop in held:
            assert first >= end, "ranks of two adapters"
            nobodys[first:stop], end = False, stop
        assert end == len(layer.a) == len(layer.b) == len(layer.s)
        assert not layer.a[nobodys].any()
        assert not layer.b[nobodys].any()
        assert not layer.s[nobodys].any()
        if what == "push" and layer.a.data_ptr() == memory:
            assert before.items() <= {slot.entry: slot.first for slot in layer.slots}.items(), "something moved"
    scales = handle.scales
    mixtures: list[dict[str, float]] = [dict.fromkeys(list(there)[:2], 0.5), {}, {list(there)[-1]: -1.0}]
    with torch.no_grad():
        assert far(model(x).double(), expected(model, list(there.values()), x, [scales] * 3)) < 1e-5
        with handle.rows(mixtures):
            assert far(model(x).double(), expected(model, list(there.values()), x, mixtures)) < 1e-5
    handle.detach()


def test_a_change_that_is_taken_back_leaves_the_numbers_there_were() -> None:
    pool = Pool()
    held: list[Span] = []
    made = [(torch.full((rank, 4), rank + 0.5), torch.full((rank, 6), rank + 0.25)) for rank in (3, 5, 2)]
    for a, b in made:
        held.append((pool.put(a, b, held, 10), len(a)))
    middle = held.pop(1)
    pool.free(middle, held)
    a, b = pool.a.clone(), pool.b.clone()
    state = pool.state()
    first = pool.put(torch.ones(4, 4), torch.ones(4, 6), held, 4)  # where the other was
    pool.free(held[0], [held[1], (first, 4)])
    assert not pool.a[:3].any()
    pool.restore(state, held)
    assert torch.equal(pool.a, a)
    assert torch.equal(pool.b, b)
    assert not pool.a[middle[0] : sum(middle)].any()
    gone = state[2]
    assert [len(kept[1]) for kept in gone] == [3]
    del state, gone
    pool.free(held[0], held[1:])
    assert pool._gone is not None
    assert pool._gone() is None, "factors that nobody can ask for are not kept"
