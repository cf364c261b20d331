"""The stack's contract, against the plain dense formula in float64."""

from __future__ import annotations

import copy
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack import LoadedLora, LoraAdapter, LoraDelta, LoraStack, TargetModule
from lorastack.errors import ArgumentError, NamingError, NonFiniteError, ShapeError

W = "model.layers.0.self_attn.q_proj.weight"


def factors(rng: np.random.Generator, rank: int, n_in: int, n_out: int, dtype: type = np.float32):
    return rng.standard_normal((rank, n_in)).astype(dtype), rng.standard_normal((n_out, rank)).astype(dtype)


def make(seed: int, rank: int = 4, n_in: int = 12, n_out: int = 9, alpha: float | None = None, name: str = "a", w=W):
    return LoadedLora.from_tensors({w: factors(np.random.default_rng(seed), rank, n_in, n_out)}, alpha, name)


def dense(stack: LoraStack, name: str) -> np.ndarray:
    """The sum as one matrix, in float64, by the plain formula."""
    total = 0.0
    for lora, scale in stack.entries:
        delta = lora.get(name)
        if delta is not None:
            total = total + scale * delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))
    return np.asarray(total)


finite = st.floats(-3, 3, allow_nan=False).map(lambda v: round(v, 3))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    scales=st.lists(finite, min_size=5, max_size=5),
    lead=st.lists(st.integers(1, 4), max_size=3),
    alpha=st.none() | st.floats(0.5, 40),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    stored=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_apply_is_the_dense_sum(ranks, scales, lead, alpha, dtype, stored, seed) -> None:
    rng = np.random.default_rng(seed)
    stack = LoraStack()
    for n, rank in enumerate(ranks):
        stack.push(LoadedLora.from_tensors({W: factors(rng, rank, 7, 5, stored)}, alpha), scales[n])
    x = rng.standard_normal((*lead, 7)).astype(dtype)
    y = stack.apply(W, x, 5)
    assert y.shape == (*lead, 5)
    assert y.dtype == (np.float64 if dtype == np.float64 else np.float32)
    expected = x.astype(np.float64) @ dense(stack, W).T
    size = sum(
        abs(s * d.scaling) * np.abs(d.b.astype(float)).max() * np.abs(d.a.astype(float)).max() * d.rank
        for s, d in stack.terms(W)
    )
    tolerance = 1e-13 if dtype == np.float64 else 2e-6
    np.testing.assert_allclose(y, expected, atol=tolerance * 7 * max(size, 1) * np.abs(x.astype(float)).max(), rtol=0)


def test_two_copies_at_a_half_equal_one_at_one() -> None:
    lora, x = make(0, alpha=16), np.random.default_rng(1).standard_normal(12).astype(np.float32)
    halves, whole = LoraStack([(lora, 0.5), (lora, 0.5)]), LoraStack([(lora, 1.0)])
    assert halves.names == ("a", "a#2")
    np.testing.assert_allclose(halves.apply(W, x, 9), whole.apply(W, x, 9), rtol=1e-5, atol=1e-5)


def test_the_same_adapter_twice_counts_twice() -> None:
    lora, x = make(0), np.ones(12)
    twice = LoraStack([(lora, 1.0), (lora, 1.0)]).apply(W, x, 9)
    np.testing.assert_allclose(twice, 2 * LoraStack([(lora, 1.0)]).apply(W, x, 9), rtol=1e-12)


def test_scale_zero_adds_nothing_and_a_negative_scale_subtracts() -> None:
    lora, x = make(0), np.ones(12)
    assert not LoraStack([(lora, 0.0)]).apply(W, x, 9).any()
    both = LoraStack([(lora, 1.5), (lora, -1.5)]).apply(W, x, 9)
    np.testing.assert_allclose(both, 0, atol=1e-12)


def test_pop_returns_the_last_and_none_when_empty() -> None:
    a, b = make(0), make(1, name="b")
    stack = LoraStack([(a, 0.7), (b, 0.3)])
    assert stack.pop() == (b, 0.3)
    assert stack.pop() == (a, 0.7)
    assert stack.pop() is None
    assert stack.is_empty()


def test_changes_show_in_the_next_apply() -> None:
    a, b, x = make(0), make(1, name="b"), np.ones(12)
    stack = LoraStack([(a, 1.0)])
    alone = stack.apply(W, x, 9)
    stack.push(b, 2.0)
    assert not np.allclose(stack.apply(W, x, 9), alone)
    stack.set_scale("b", 0.0)
    np.testing.assert_array_equal(stack.apply(W, x, 9), alone)
    stack.set_scale("b", 1.0)
    stack.remove("b")
    np.testing.assert_array_equal(stack.apply(W, x, 9), alone)
    stack.clear()
    assert not stack.apply(W, x, 9).any()


def test_an_unknown_weight_gives_zeros_of_out_features() -> None:
    y = LoraStack([(make(0), 1.0)]).apply("no.such.weight", np.ones((2, 3, 99), np.float32), 17)
    assert y.shape == (2, 3, 17)
    assert y.dtype == np.float32
    assert not y.any()


def test_a_misfit_raises_with_both_shapes() -> None:
    stack = LoraStack([(make(0), 1.0)])
    with pytest.raises(ShapeError, match="x has 4 features, this delta takes 12"):
        stack.apply(W, np.ones(4), 9)
    with pytest.raises(ShapeError, match="out_features is 8, but a has 9"):
        stack.apply(W, np.ones(12), 8)
    stack.push(make(1, n_in=5, name="b"))
    with pytest.raises(ShapeError, match=r"a: linear 12 -> 9\n.*b: linear 5 -> 9"):
        stack.apply(W, np.ones(12), 9)


def test_integers_are_refused_for_a_linear_weight() -> None:
    with pytest.raises(ShapeError, match="x is int64, this delta takes floating-point input"):
        LoraStack([(make(0), 1.0)]).apply(W, np.ones(12, int), 9)


def test_remove_lists_the_names_there_are() -> None:
    stack = LoraStack([(make(0), 1.0), (make(1, name="b"), 1.0)])
    with pytest.raises(LookupError, match=r"'zara'.*there are: a, b"):
        stack.remove("zara")
    assert len(stack) == 2


def test_names_of_two_kinds_do_not_mix() -> None:
    stack = LoraStack([(make(0), 1.0)])
    with pytest.raises(NamingError, match=r"b has GGUF tensor names, a on this stack has Hugging Face names"):
        stack.push(make(1, name="b", w="blk.0.attn_q.weight"))
    assert len(stack) == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much", None])
def test_a_scale_is_a_finite_number(scale) -> None:
    stack = LoraStack()
    with pytest.raises(ArgumentError, match="a scale is"):
        stack.push(make(0), scale)
    assert stack.is_empty()


class Mine:
    """An adapter of the user's own."""

    rank, alpha, target_modules = 2, 6.0, (TargetModule.QUERY_PROJ, TargetModule.custom(42))

    def __init__(self, seed: int = 0) -> None:
        self.held = LoraDelta(*factors(np.random.default_rng(seed), 2, 12, 9))

    def delta(self, target: TargetModule, layer: int) -> LoraDelta | None:
        return self.held if target in self.target_modules and layer == 3 else None


def test_protocol_adapters_apply_by_target_and_layer() -> None:
    first, second = Mine(0), Mine(1)
    assert isinstance(first, LoraAdapter)
    stack = LoraStack()
    stack.push_adapter(first)
    stack.push_adapter(second)
    x = np.random.default_rng(2).standard_normal((5, 12))
    expected = 3.0 * (x @ (first.held.dense() + second.held.dense()).astype(np.float64).T)
    np.testing.assert_allclose(stack.applied_delta(TargetModule.QUERY_PROJ, 3, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stack.applied_delta(TargetModule.custom(42), 3, x), expected, rtol=1e-4, atol=1e-4)
    assert stack.applied_delta(TargetModule.QUERY_PROJ, 2, x) is None
    assert stack.applied_delta(TargetModule.UP_PROJ, 3, x) is None


def test_a_stack_with_only_protocol_adapters_is_true_and_not_empty() -> None:
    stack = LoraStack()
    assert not stack
    stack.push_adapter(Mine())
    assert stack
    assert not stack.is_empty()
    assert len(stack) == 0
    stack.clear()
    assert not stack
    assert stack.adapters == ()


def test_what_is_no_adapter_is_refused() -> None:
    stack = LoraStack()
    with pytest.raises(ArgumentError, match="it lacks rank, alpha, target_modules, delta"):
        stack.push_adapter(object())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="push\\(\\) takes a LoadedLora, got Mine"):
        stack.push(Mine())  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [None, 3.0, 16.0])
def test_a_loaded_adapter_is_a_protocol_adapter_with_the_true_scaling(alpha) -> None:
    rng = np.random.default_rng(0)
    names = {f"model.layers.{n}.mlp.up_proj.weight": factors(rng, n + 1, 6, 8) for n in range(3)}
    lora = LoadedLora.from_tensors(names, alpha)
    assert isinstance(lora, LoraAdapter)
    assert lora.layers == (0, 1, 2)
    assert [str(t) for t in lora.target_modules] == ["up_proj"]
    stack = LoraStack()
    stack.push_adapter(lora)
    x = rng.standard_normal(6)
    for n, name in enumerate(names):
        expected = lora.adapters[name].dense().astype(float) @ x
        np.testing.assert_allclose(stack.applied_delta(TargetModule.UP_PROJ, n, x), expected, rtol=1e-5, atol=1e-6)


def test_terms_give_scale_and_delta_in_the_order_pushed() -> None:
    a, b, other = make(0), make(1, name="b"), make(2, name="c", w="other.weight")
    stack = LoraStack([(a, 0.5), (other, 9.0), (b, -1.0)])
    assert list(stack.terms(W)) == [(0.5, a.get(W)), (-1.0, b.get(W))]
    assert stack.weights == (W, "other.weight")


def test_a_copy_has_its_own_list_and_the_same_weights() -> None:
    stack = LoraStack([(make(0), 1.0)])
    twin = copy.copy(stack)
    twin.push(make(1, name="b"))
    assert (len(stack), len(twin)) == (1, 2)
    assert twin.entries[0][0] is stack.entries[0][0]
    assert copy.deepcopy(stack.entries[0][0]) is stack.entries[0][0]


def test_deltas_and_their_arrays_are_frozen() -> None:
    source = np.ones((1, 3), np.float32)
    delta = LoraDelta(source, np.ones((2, 1), np.float32))
    source[:] = 7
    assert delta.a[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        delta.a[0, 0] = 5
    with pytest.raises(AttributeError, match="frozen"):
        delta.scaling = 2.0
    with pytest.raises(AttributeError):
        make(0).name = "other"  # type: ignore[misc]


def test_nonfinite_factors_are_all_listed_when_first_read() -> None:
    a, b = factors(np.random.default_rng(0), 2, 3, 4)
    a[0, 0], b[1, 1] = np.nan, np.inf
    lora = LoadedLora.from_tensors({W: (a, b)}, name="broken")
    with pytest.raises(NonFiniteError) as caught:
        LoraStack([(lora, 1.0)]).apply(W, np.ones(3), 4)
    assert len(caught.value.problems) == 2
    assert f"broken: {W}.lora_A: 1 of 6 values" in caught.value.problems[0]
    let_in = LoadedLora.from_tensors({W: (a, b)}, allow_nonfinite=True)
    assert np.isnan(LoraStack([(let_in, 1.0)]).apply(W, np.ones(3), 4)).any()
    assert not LoraStack([(let_in, 0.0)]).apply(W, np.ones(3), 4).any()


def test_an_embedding_takes_ids() -> None:
    rng = np.random.default_rng(0)
    a, b = factors(rng, 3, 20, 6)
    lora = LoadedLora.from_tensors({"token_embd.weight": (a, b)}, alpha=6)
    ids = np.array([[1, 19, 0], [5, 5, 2]])
    y = LoraStack([(lora, 0.5), (lora, 0.25)]).apply("token_embd.weight", ids, 6)
    expected = 0.75 * 2 * (a.T.astype(float) @ b.T.astype(float))[ids]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="token ids run from 0 to 20, this update's vocabulary is 20"):
        LoraStack([(lora, 1.0)]).apply("token_embd.weight", np.array([0, 20]), 6)
    with pytest.raises(ShapeError, match="it takes integer token ids"):
        LoraStack([(lora, 1.0)]).apply("token_embd.weight", np.ones(20), 6)


def test_experts_apply_to_one_input_each() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 2, 5)), rng.standard_normal((3, 7, 2))
    lora = LoadedLora.from_tensors({"blk.0.ffn_up_exps.weight": (a, b)}, alpha=4)
    assert (lora.rank, lora.adapters["blk.0.ffn_up_exps.weight"].num_experts) == (2, 3)
    x = rng.standard_normal((3, 4, 5))
    y = LoraStack([(lora, 0.5), (lora, 1.0)]).apply("blk.0.ffn_up_exps.weight", x, 7)
    np.testing.assert_allclose(y, 1.5 * 2 * np.einsum("eor,eri,eni->eno", b, a, x), rtol=1e-10)


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"lora_A is \(4, 64\) and lora_B is \(64, 5\): rank 4 against 5"):
        LoraDelta(np.ones((4, 64)), np.ones((64, 5)))
    with pytest.raises(ShapeError, match="2 experts against 3"):
        LoraDelta(np.ones((2, 4, 64)), np.ones((3, 64, 4)))


def test_views_select_and_scale_by_pattern() -> None:
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors({f"blk.{n}.attn_q.weight": factors(rng, 2, 3, 4) for n in range(12)}, alpha=4)
    assert list(lora.select("blk.[0-9].*").adapters) == [f"blk.{n}.attn_q.weight" for n in range(10)]
    view = lora.scaled({"blk.0.*": 0.5, "blk.*": 3.0})
    assert [view.adapters[f"blk.{n}.attn_q.weight"].scaling for n in (0, 1, 11)] == [1.0, 6.0, 6.0]
    assert lora.adapters["blk.0.attn_q.weight"].scaling == 2.0
    with pytest.raises(ArgumentError, match=r"no weight matches \['blk.99.\*'\]"):
        lora.scaled({"blk.99.*": 2.0})


def test_a_stack_is_safe_to_read_from_several_threads() -> None:
    stack = LoraStack([(make(n, name=str(n)), 0.1 * n) for n in range(6)])
    x = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    expected = x.astype(float) @ dense(stack, W).T
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(stack.apply(W, x, 9))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    for y in results:
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_target_modules_have_the_fields_names() -> None:
    names = "QUERY_PROJ KEY_PROJ VALUE_PROJ OUTPUT_PROJ GATE_PROJ UP_PROJ DOWN_PROJ".split()
    assert [str(getattr(TargetModule, n)) for n in names] == (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert str(TargetModule.custom(42)) == "custom_42"
    assert TargetModule.custom(1) == TargetModule.custom(1) != TargetModule.custom(2)
    with pytest.raises(ArgumentError, match="'nonsense' is not a target module"):
        TargetModule.of("nonsense")
