"""Pairs of adapters against the dense updates in float64, and how much memory comparing takes."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack import LoadedLora, LoraDelta, LoraStack, load
from lorastack.algebra import compare as module
from lorastack.algebra.compare import Comparison, compare, principal_angles, verdict
from lorastack.algebra.lowrank import Matrix, matrices
from lorastack.algebra.signs import sign_counts
from lorastack.errors import ArgumentError, NonFiniteError, ShapeError
from tests.updates import SHAPES, adapter, dense, dense_spaces, linear, update


def check_pair(found: Comparison, stack: LoraStack, i: int, j: int) -> None:
    """Every number of one pair, formed from dense matrices."""
    (x, s), (y, t) = stack.entries[i], stack.entries[j]
    names = dict.fromkeys([*x.adapters, *y.adapters])
    zero = {n: np.zeros_like(dense(x.get(n) or y.adapters[n])) for n in names}
    xs = {n: dense(x.adapters[n], s) if n in x.adapters else zero[n] for n in names}
    ys = {n: dense(y.adapters[n], t) if n in y.adapters else zero[n] for n in names}
    one, two = (np.concatenate([part.ravel() for part in parts.values()]) for parts in (xs, ys))
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    if lengths[0] * lengths[1] > 0:
        np.testing.assert_allclose(found.cosine[i, j], one @ two / lengths[0] / lengths[1], atol=1e-9)
    else:
        assert np.isnan(found.cosine[i, j])
    if sum(lengths) > 0:
        np.testing.assert_allclose(found.pileup[i, j], np.linalg.norm(one + two) / sum(lengths), atol=1e-7)
    shared, chance, smaller = np.zeros(2), np.zeros(2), 0
    for n in set(x.adapters) & set(y.adapters):
        for a, b in zip(xs[n], ys[n], strict=True):
            pairs = list(zip(dense_spaces(a), dense_spaces(b), strict=True))
            smaller += min(p.shape[1] for p in pairs[0])
            for side, (p, q) in enumerate(pairs):
                shared[side] += np.sum((p.T @ q) ** 2)
                chance[side] += p.shape[1] * q.shape[1] / p.shape[0]
    if smaller:
        got = [found.out_overlap[i, j], found.in_overlap[i, j]]
        np.testing.assert_allclose(got, shared / smaller, atol=1e-6)
        np.testing.assert_allclose([found.out_chance[i, j], found.in_chance[i, j]], chance / smaller, rtol=1e-9)
    else:
        assert np.isnan(found.in_overlap[i, j])
    both = (one != 0) & (two != 0)
    if both.any():
        # Where a sum cancels to its rounding, its sign is that rounding's.
        slack = np.sum(np.minimum(abs(one), abs(two))[both] < 1e-12) / both.sum()
        want = np.sum((one * two)[both] < 0) / both.sum()
        assert abs(found.sign_conflict[i, j] - want) <= slack + 1e-12
    else:
        assert np.isnan(found.sign_conflict[i, j])


@st.composite
def stacks(draw: st.DrawFn) -> LoraStack:
    """Two to four adapters that share some weights, of several kinds; some repeat, some change nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    stack = LoraStack()
    for n in range(draw(st.integers(2, 4))):
        kinds = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        deltas = {kind: update(rng, kind, draw(st.integers(1, 8))) for kind in sorted(kinds)}  # type: ignore[arg-type]
        if draw(st.booleans()):
            first = next(iter(deltas))
            deltas[first] = LoraDelta(deltas[first].a, 0 * deltas[first].b, 1.0, deltas[first].kind)
        stack.push(adapter(f"a{n}", **deltas), draw(st.sampled_from([1.0, 0.3, -2.0, 0.0])))
    if draw(st.booleans()):
        stack.push(*stack.entries[0])
    return stack


@settings(max_examples=60, deadline=None)
@given(stack=stacks())
def test_every_pair_is_what_the_dense_updates_say(stack: LoraStack) -> None:
    found = compare(stack)
    for i, j in itertools.combinations(range(len(stack)), 2):
        check_pair(found, stack, i, j)
    for name in module.NUMBERS:
        values = getattr(found, name)
        np.testing.assert_array_equal(values, values.T)
    assert found.names == stack.names
    assert found.signs_exact


def test_by_weight_holds_each_weight_alone() -> None:
    rng = np.random.default_rng(5)
    full = [adapter(n, p=linear(rng, 6, 5, 2), q=linear(rng, 7, 4, 3)) for n in "xy"]
    found = compare(LoraStack([(lora, 1.0) for lora in full]))
    assert found.by_weight is not None
    for at, name in enumerate(found.weights):
        alone = compare(LoraStack([(lora.select(name), 1.0) for lora in full]))
        for number in module.NUMBERS:
            np.testing.assert_allclose(getattr(found.by_weight, number)[at], getattr(alone, number))


@pytest.mark.parametrize("many", [False, True])
def test_many_adapters_give_the_same_numbers_without_those_by_weight(
    many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(module, "FEW", 2)
    rng = np.random.default_rng(6)
    stack = LoraStack([(adapter(n, w=linear(rng, 30, 20, 4)), 1.0) for n in "xyz"])
    found = compare(stack)
    assert (found.by_weight is None) is many
    (x, _), (y, _) = stack.entries[:2]
    one, two = dense(x.adapters["w"]).ravel(), dense(y.adapters["w"]).ravel()
    np.testing.assert_allclose(
        found.cosine[0, 1], one @ two / np.linalg.norm(one) / np.linalg.norm(two), atol=1e-6 if many else 1e-12
    )


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_numbers_do_not_depend_on_how_an_update_is_factored(rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = linear(rng, 9, 8, rank), linear(rng, 9, 8, 3)
    g = rng.standard_normal((rank, rank)) + 3 * np.eye(rank)
    other = LoraDelta(np.linalg.solve(g, one.a.astype(np.float64)), one.b.astype(np.float64) @ g)
    found = [compare(LoraStack([(adapter("x", w=w), 1.0), (adapter("y", w=two), 1.0)])) for w in (one, other)]
    for number in module.NUMBERS:
        np.testing.assert_allclose(getattr(found[0], number), getattr(found[1], number), atol=1e-7)


def test_an_adapter_and_itself_pile_up_and_its_negative_cancels() -> None:
    lora = adapter("x", w=linear(np.random.default_rng(0), 8, 6, 2))
    found = compare(LoraStack([(lora, 1.0), (lora, 2.0), (lora, -1.0)]))
    np.testing.assert_allclose(found.cosine[0], [1, 1, -1], atol=1e-12)
    np.testing.assert_allclose(found.pileup[0], [1, 1, 0], atol=1e-7)
    np.testing.assert_allclose(found.sign_conflict[0], [0, 0, 1])
    np.testing.assert_allclose(found.in_overlap, 1)
    assert [verdict(c) for c in found.cosine[0]] == ["pile up", "pile up", "cancel"]
    assert [one[:2] for one in found.near_duplicates] == [("x", "x#2")]
    assert found.near_duplicates[0].ratio == pytest.approx(2)
    assert found.norm == pytest.approx(2 * found.adapters[0].norm)
    assert found.total_pileup == pytest.approx(0.5)


def test_random_subspaces_overlap_as_chance_says() -> None:
    rng = np.random.default_rng(0)
    stack = LoraStack([(adapter(f"a{n}", w=linear(rng, 60, 40, 6)), 1.0) for n in range(20)])
    found = compare(stack)
    pairs = np.triu_indices(20, 1)
    np.testing.assert_allclose(found.in_chance[pairs], 6 / 40)
    np.testing.assert_allclose(found.in_overlap[pairs].mean(), 6 / 40, rtol=0.05)
    np.testing.assert_allclose(found.out_overlap[pairs].mean(), 6 / 60, rtol=0.05)
    np.testing.assert_allclose(found.sign_conflict[pairs].mean(), 0.5, atol=0.01)


def test_adapters_without_a_weight_in_common_are_orthogonal() -> None:
    rng = np.random.default_rng(0)
    found = compare(LoraStack([(adapter(n, **{n: linear(rng, 5, 4, 2)}), 1.0) for n in "xy"]))
    assert found.cosine[0, 1] == 0
    assert np.isnan(found.in_overlap[0, 1])
    assert json.loads(json.dumps(found.to_dict()))["pairs"][0]["sign_conflict"] is None


def test_principal_angles_are_those_between_the_spaces() -> None:
    eye = np.eye(6)
    turned = np.cos(0.3) * eye[0] + np.sin(0.3) * eye[4]
    tiny = np.cos(1e-9) * eye[1] + np.sin(1e-9) * eye[5]
    x, y = Matrix(eye[:, :2], eye[:2]), Matrix(eye[:, :2], np.stack([turned, tiny]))
    rows, columns = principal_angles(x, y)
    np.testing.assert_allclose(rows, [1e-9, 0.3], rtol=1e-6)
    np.testing.assert_allclose(columns, [0, 0], atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(p=st.integers(0, 6), q=st.integers(0, 6), seed=st.integers(0, 1000))
def test_principal_angles_explain_the_overlap(p: int, q: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (
        matrices([(1.0, LoraDelta(d.a, d.b if r else 0 * d.b))])[0]
        for r in (p, q)
        for d in [linear(rng, 9, 8, max(r, 1))]
    )
    rows, columns = principal_angles(x, y)
    spaces = list(zip(dense_spaces(x.b @ x.a), dense_spaces(y.b @ y.a), strict=True))
    for angles, (one, two) in zip((columns, rows), spaces, strict=True):
        assert len(angles) == min(p, q)
        assert np.all(np.diff(angles) >= -1e-12)
        np.testing.assert_allclose(np.sum(np.cos(angles) ** 2), np.sum((one.T @ two) ** 2), atol=1e-6)
    with pytest.raises(ShapeError, match=r"\[9, 8\] and \[2, 3\]"):
        principal_angles(x, Matrix(np.ones((2, 1)), np.ones((1, 3))))


def test_sampled_signs_are_near_the_exact_ones_and_the_same_each_time() -> None:
    rng = np.random.default_rng(2)
    x, y = (matrices([(1.0, linear(rng, 300, 200, 3))])[0] for _ in range(2))
    near = Matrix(x.b + 0.2 * y.b, x.a)
    whole = sign_counts([x, near, None], None)
    assert whole.looked == 60_000
    some = sign_counts([x, near, None], 2500)
    assert 2000 < some.looked <= 2500
    again = sign_counts([x, near, None], 2500)
    np.testing.assert_array_equal(some.differ, again.differ)
    share = [counts.differ[0, 1] / counts.both[0, 1] for counts in (whole, some)]
    assert 0.02 < share[0] < 0.4
    assert abs(share[1] - share[0]) < 0.05
    assert whole.both[0, 2] == 0
    product = (x.b @ x.a) * (near.b @ near.a)
    assert whole.differ[0, 1] == np.sum(product < 0)


def test_no_out_by_in_matrix_is_formed() -> None:
    rng = np.random.default_rng(0)
    out = n_in = 4096
    stack = LoraStack([(adapter(n, w=linear(rng, out, n_in, 8)), 1.0) for n in "xyz"])
    compare(stack)
    tracemalloc.start()
    found = compare(stack)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One update would be 128 MiB in float64; the factors of all three are 1.5 MiB.
    assert peak < 24 << 20
    assert found.signs_exact
    sampled = compare(stack, sign_samples=1 << 12)
    assert sampled.sign_entries == out * n_in, "few adapters are looked at whole"


def test_signs_are_sampled_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIGNS_EXACT_TO", 1000)
    rng = np.random.default_rng(0)
    stack = LoraStack([(adapter(n, w=linear(rng, 100, 100, 8)), 1.0) for n in "xyz"])
    found = compare(stack, sign_samples=400)
    assert not found.signs_exact
    assert found.sign_entries == 400
    assert compare(stack, sign_samples=None).signs_exact


def test_bad_input_is_one_error_that_lists_everything() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ArgumentError, match="the stack is empty"):
        compare(LoraStack())
    x = adapter("x", p=linear(rng, 4, 3, 1), q=linear(rng, 4, 3, 1), r=linear(rng, 4, 3, 1))
    y = adapter("y", p=linear(rng, 5, 3, 1), q=linear(rng, 4, 3, 1), r=linear(rng, 4, 2, 1))
    with pytest.raises(ShapeError, match="2 problems") as caught:
        compare(LoraStack([(x, 1), (y, 1)]))
    assert [line.partition(":")[0] for line in caught.value.problems] == ["p", "r"]
    assert "x: linear 3 -> 4; y: linear 3 -> 5" in str(caught.value)
    with pytest.raises(ArgumentError, match="give 1, each once"):
        compare(LoraStack([(x, 1)]), names=["a", "b"])


def test_adapters_known_by_target_and_layer_count_when_the_base_names_their_weights(demo: Path) -> None:
    lora = load(demo / "luna")
    stack = LoraStack([(lora, 1.0)])
    stack.push_adapter(lora)
    with pytest.raises(ArgumentError, match="1 adapters are known by"):
        compare(stack)
    found = compare(stack, demo / "base", intruders=None)
    assert found.names == ("luna", "adapter1")
    assert found.cosine[0, 1] == pytest.approx(1)
    assert found.adapters[1].norm == pytest.approx(found.adapters[0].norm)


@pytest.mark.parametrize("allow", [False, True])
def test_nan_is_an_error_that_lists_each(allow: bool) -> None:
    nan = np.full((4, 1), np.nan, np.float32)
    tensors = {n: (np.ones((1, 3), np.float32), nan) for n in "pq"}
    lora = LoadedLora.from_tensors(tensors, name="x", allow_nonfinite=allow)
    with pytest.raises(NonFiniteError, match="2 problems") as caught:
        compare(LoraStack([(lora, 1.0)]))
    assert "x: p" in str(caught.value)
    assert "x: q" in str(caught.value)


def test_what_is_not_low_rank_is_named(shared: Path) -> None:
    found = compare(LoraStack([(load(shared / "stories260k" / "adapters" / "excited-dora"), 1.0)]))
    assert found.adapters[0].left_out == ("15 dora: a DoRA magnitude (rescales the rows of the changed weight)",)


def test_real_adapters_of_different_ranks(shared: Path) -> None:
    folders = ("gpt2-tigrinya-v1", "gpt2-tigrinya-v2", "dialogpt-small-patient")
    stack = LoraStack([(load(shared / "peft" / name), 1.0) for name in folders])
    done: list[int] = []
    found = compare(stack, allow_mixed_bases=True, progress=done.append)
    assert sum(done) == len(stack.weights)
    loras = [lora for lora, _ in stack.entries]
    products = np.zeros((3, 3))
    for name in stack.weights:
        rows = [dense(lora.adapters[name]).ravel() if name in lora.adapters else None for lora in loras]
        for i, j in itertools.product(range(3), range(3)):
            if rows[i] is not None and rows[j] is not None:
                products[i, j] += rows[i] @ rows[j]
    norms = np.sqrt(products.diagonal())
    np.testing.assert_allclose(found.cosine, products / norms / norms[:, None], atol=1e-9)
    np.testing.assert_allclose([one.norm for one in found.adapters], norms)
    np.testing.assert_allclose(found.in_overlap.diagonal(), 1)
    assert not found.near_duplicates
