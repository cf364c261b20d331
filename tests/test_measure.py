"""Measures of one adapter against the singular values of the dense update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack import LoraStack
from lorastack.algebra.compare import compare
from lorastack.algebra.measure import AdapterMeasure, WeightMeasure
from tests.updates import SHAPES, adapter, dense, dense_rank, linear, update


def measured(stack: LoraStack) -> AdapterMeasure:
    return compare(stack).adapters[0]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    rank=st.integers(1, 9),
    scale=st.sampled_from([1.0, -0.3, 2.5, 1e-4]),
    repeated=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_one_weight_is_what_the_dense_update_says(
    kind: str, rank: int, scale: float, repeated: bool, seed: int
) -> None:
    delta = update(np.random.default_rng(seed), kind, rank)  # type: ignore[arg-type]
    if repeated and kind == "linear" and rank > 1:
        a = delta.a.copy()
        a[1] = a[0]
        delta = type(delta)(a, delta.b, delta.scaling)
    one = measured(LoraStack([(adapter("x", w=delta), scale)])).weights[0]
    blocks = dense(delta, scale)
    sigma = np.sort(np.concatenate([np.linalg.svd(block, compute_uv=False) for block in blocks]))[::-1]
    ranks = sum(dense_rank(block) for block in blocks)
    assert one.rank == len(one.spectrum) == ranks
    np.testing.assert_allclose(one.spectrum, sigma[:ranks], rtol=1e-7, atol=1e-9 * sigma[0])
    np.testing.assert_allclose(one.norm, np.linalg.norm(blocks), rtol=1e-9)
    np.testing.assert_allclose(one.stable_rank, np.sum(blocks**2) / sigma[0] ** 2, rtol=1e-9)
    share = sigma[:ranks] / sigma[:ranks].sum()
    np.testing.assert_allclose(one.effective_rank, np.exp(-np.sum(share * np.log(share))), rtol=1e-6)
    assert one.shape == (blocks.shape if kind == "experts" else blocks.shape[1:])


def test_the_adapter_is_all_its_weights() -> None:
    rng = np.random.default_rng(1)
    small, large = linear(rng, 6, 5, 2, 0.1), linear(rng, 8, 4, 3, 2.0)
    one = measured(LoraStack([(adapter("x", small=small, large=large), -0.5)]))
    want = np.sqrt(np.sum(dense(small, 0.5) ** 2) + np.sum(dense(large, 0.5) ** 2))
    assert one.norm == pytest.approx(want)
    assert [weight.name for weight in one.strongest()] == ["large", "small"]
    assert one.stable_rank == pytest.approx(np.mean([weight.stable_rank for weight in one.weights]))
    assert (one.scale, one.relative, one.intruders, one.examined) == (-0.5, None, None, None)


@pytest.mark.parametrize(("scale", "zero_b"), [(0.0, False), (1.0, True)])
def test_an_update_that_changes_nothing_has_rank_0(scale: float, zero_b: bool) -> None:
    delta = linear(np.random.default_rng(0), 6, 5, 2)
    if zero_b:
        delta = type(delta)(delta.a, np.zeros_like(delta.b))
    one = measured(LoraStack([(adapter("x", w=delta), scale)]))
    assert (one.norm, one.weights[0].rank, one.weights[0].spectrum) == (0.0, 0, ())
    assert (one.stable_rank, one.effective_rank, one.weights[0].effective_rank) == (0.0, 0.0, 0.0)


def test_equal_singular_values_have_the_full_stable_and_effective_rank() -> None:
    one = WeightMeasure("w", (8, 8), 4, 2.0, None, (1.0, 1.0, 1.0, 1.0))
    assert one.stable_rank == pytest.approx(4)
    assert one.effective_rank == pytest.approx(4)
    steep = WeightMeasure("w", (8, 8), 2, 1.0, None, (1.0, 1e-3))
    assert steep.stable_rank == pytest.approx(1, abs=1e-5)
    assert 1 < steep.effective_rank < 1.01
