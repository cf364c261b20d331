"""Truncated bakes: against the SVD of the dense sum in float64 (Eckart and Young), and on real adapters."""

from __future__ import annotations

import tomllib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorastack import LoadedLora, LoraDelta, LoraStack, load
from lorastack.algebra.lowrank import Matrix, basis, inner, matrices, norm, svd
from lorastack.errors import ArgumentError, NonFiniteError, ShapeError
from lorastack.torch import attach
from tests.test_bake import SHAPES, delta_of, dense

F32 = np.dtype(np.float32)


def flat(array: np.ndarray, kind: str) -> np.ndarray:
    """A dense update as a stack of matrices ``[experts or 1, out, in]``."""
    return array if kind == "experts" else array.reshape(1, array.shape[0], -1)


def dense_sum(stack: LoraStack, weight: str) -> np.ndarray:
    return sum(scale * dense(delta) for scale, delta in stack.terms(weight))  # type: ignore[return-value]


def tail(whole: np.ndarray, rank: int) -> float:
    """The error of the best approximation of that rank, relative, by LAPACK on the dense matrices."""
    sigma = np.linalg.svd(whole, compute_uv=False)
    return float(np.sqrt((sigma[:, rank:] ** 2).sum() / (sigma**2).sum()))


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def two(out: int = 40, n_in: int = 30, ranks: tuple[int, ...] = (6, 6), seed: int = 0) -> LoraStack:
    rng = np.random.default_rng(seed)
    loras = [
        LoadedLora.from_tensors({"w": (rng.standard_normal((r, n_in)), rng.standard_normal((out, r)))}, name=f"a{n}")
        for n, r in enumerate(ranks)
    ]
    return LoraStack([(lora, 0.7 - 0.4 * n) for n, lora in enumerate(loras)])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rank=st.integers(1, 5),
    twice=st.booleans(),
    untrained=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_the_cut_is_the_best_there_is(kind, ranks, rank, twice, untrained, seed) -> None:
    rng = np.random.default_rng(seed)
    deltas = [delta_of(rng, kind, r, F32, float(rng.uniform(0.2, 2))) for r in ranks]
    if untrained:
        deltas.append(LoraDelta(deltas[0].a, np.zeros_like(deltas[0].b), 1.0, deltas[0].kind))
    if twice:
        deltas.append(deltas[0])
    stack = LoraStack([(LoadedLora.from_tensors({"w": delta}), float(rng.uniform(-2, 2))) for delta in deltas])
    whole = flat(dense_sum(stack, "w"), kind)
    rank = min(rank, *whole.shape[1:], sum(delta.rank for delta in deltas))
    baked = stack.bake(rank=rank)
    delta = baked.adapters["w"]
    assert (delta.kind, delta.rank) == (kind, rank)
    expected = tail(whole, rank)
    assert baked.made["errors"]["w"] == pytest.approx(expected, abs=1e-6)
    assert far(flat(dense(delta), kind), whole) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 40), n_in=st.integers(1, 40), rank=st.integers(0, 45), seed=st.integers(0, 9999))
def test_norm_inner_product_and_singular_values_are_the_dense_ones(out, n_in, rank, seed) -> None:
    rng = np.random.default_rng(seed)
    x, y = (Matrix(rng.standard_normal((out, rank)), rng.standard_normal((rank, n_in))) for _ in "xy")
    dense_x, dense_y = x.b @ x.a, y.b @ y.a
    size = np.linalg.norm(dense_x) * np.linalg.norm(dense_y) + 1e-300
    assert norm(x) == pytest.approx(np.linalg.norm(dense_x), rel=1e-12)
    assert abs(inner(x, y) - np.sum(dense_x * dense_y)) < 1e-12 * size
    expected = np.linalg.svd(dense_x, compute_uv=False)
    found = np.zeros_like(expected)
    sigma = svd(x).sigma[: len(expected)]
    found[: len(sigma)] = sigma
    assert np.allclose(found, expected, rtol=0, atol=1e-12 * max(1, *expected))


@pytest.mark.parametrize("spread", [0, 2, 4, 8], ids="1e{}".format)
def test_a_basis_holds_its_columns_however_near_to_dependence_they_are(spread: int) -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((50, 6)))[0], np.linalg.qr(rng.standard_normal((6, 6)))[0]
    x = u * np.logspace(0, -spread, 6) @ v
    tall = basis(x)
    q = tall.lift(np.eye(len(tall.core)))
    assert np.allclose(q @ tall.core, x, atol=1e-12)
    assert np.allclose(q.T @ q, np.eye(len(tall.core)), atol=1e-7)


def test_energy_and_tolerance_take_the_smallest_rank_that_keeps_them() -> None:
    stack = two()
    whole = dense_sum(stack, "w")[None]
    errors = [tail(whole, rank) for rank in range(13)]
    for limit, options in ((np.sqrt(0.1), {"energy": 0.9}), (0.05, {"tolerance": 0.05}), (0.0, {"energy": 1.0})):
        smallest = next((r for r in range(1, 13) if errors[r] <= limit), 12)
        assert stack.bake(**options).rank == smallest
    assert stack.bake(rank=[2, 7, 11], energy=0.9).rank == next(r for r in (2, 7, 11) if errors[r] <= np.sqrt(0.1))
    assert stack.bake(rank=[1, 2]).rank == 2, "none keeps 0.99, so the largest"
    assert stack.bake(rank=3, tolerance=1e-6).rank == 3, "a rank is a limit also where a tolerance is not met"


def test_linear_is_the_sum_without_dependent_ranks() -> None:
    lora = two().entries[0][0]
    stack = LoraStack([(lora, 0.5), (lora, 0.25)])
    baked = stack.bake(method="linear")
    assert stack.bake().rank == 12
    assert baked.rank == 6
    assert far(dense(baked.adapters["w"]), dense_sum(stack, "w")) < 1e-6


def test_many_ranks_go_the_dense_way_and_come_to_the_same() -> None:
    stack = two(20, 16, (6, 7))
    baked = stack.bake(rank=5)
    assert baked.made["error"] == pytest.approx(tail(dense_sum(stack, "w")[None], 5), abs=1e-6)
    assert far(dense(baked.adapters["w"]), dense_sum(stack, "w")) == pytest.approx(baked.made["error"], abs=1e-6)


def test_no_matrix_of_out_by_in_is_formed() -> None:
    stack = two(4096, 4096, (8, 8))
    tracemalloc.start()
    stack.bake(rank=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, f"{peak / 2**20:.0f} MiB; the product has 64 in float32"


def test_the_error_is_stored_in_the_file(tmp_path: Path) -> None:
    ours = [(LoadedLora.from_tensors({"m.weight": lora.adapters["w"]}), s) for lora, s in two().entries]
    baked = LoraStack(ours).bake(rank=4, name="small")
    baked.save(tmp_path / "small")
    said = tomllib.loads(load(tmp_path / "small").metadata["lorastack.recipe"])["lorastack"]
    assert (said["method"], said["rank"], said["ranks"]) == ("svd", 4, {"m.weight": 4})
    assert said["error"] == pytest.approx(baked.made["error"], rel=1e-9)
    assert said["errors"] == {"m.weight": pytest.approx(said["error"], rel=1e-9)}


def test_overall_is_the_error_of_all_weights_as_one() -> None:
    rng = np.random.default_rng(3)
    big = {n: (rng.standard_normal((4, 9)), rng.standard_normal((8, 4)) * 10**n) for n in range(3)}
    stack = LoraStack([(LoadedLora.from_tensors({f"w{n}": pair for n, pair in big.items()}), 1.0)])
    baked = stack.bake(rank=2)
    lost = sum(np.linalg.norm(dense(baked.adapters[w]) - dense_sum(stack, w)) ** 2 for w in stack.weights)
    total = sum(np.linalg.norm(dense_sum(stack, w)) ** 2 for w in stack.weights)
    assert baked.made["error"] == pytest.approx(np.sqrt(lost / total), abs=1e-6)


@pytest.mark.parametrize("rank", [13, 4096, [13, 40], [8, 16]])
@pytest.mark.parametrize("shape", [(40, 30), (9, 14), (3, 50)])
def test_a_rank_above_all_there_is_keeps_everything(rank, shape) -> None:
    stack, most = two(*shape), min(12, *shape)
    baked = stack.bake(rank=rank, tolerance=0.0 if isinstance(rank, list) else None)
    assert (baked.rank, baked.made["error"]) == (most, 0.0)
    assert baked.made["ranks"] == {"w": most}
    if rank != [8, 16] or most < 8:
        assert baked.made["rank"] == most
    np.testing.assert_allclose(dense(baked.adapters["w"]), dense_sum(stack, "w"), atol=1e-5)


@pytest.mark.parametrize("method", ["ties@dense", "ties@knots", "dare@core", "magnitude_prune@dense"])
def test_a_rank_above_all_there_is_is_the_most_a_method_can_give(method) -> None:
    free, above = (two(9, 14).bake(method=method, rank=rank) for rank in (9, 1000))
    assert (above.rank, above.made["rank"], above.made["error"]) == (9, 9, free.made["error"])
    np.testing.assert_array_equal(dense(above.adapters["w"]), dense(free.adapters["w"]))


def test_where_ranks_are_mixed_each_weight_keeps_what_it_has() -> None:
    rng = np.random.default_rng(5)
    pairs = {f"w{r}": (rng.standard_normal((r, 30)), rng.standard_normal((40, r))) for r in (4, 16)}
    baked = LoraStack([(LoadedLora.from_tensors(pairs), 1.0)]).bake(rank=8)
    assert (baked.made["rank"], baked.made["ranks"]) == (8, {"w4": 4, "w16": 8})
    assert baked.made["errors"]["w4"] == 0.0 < baked.made["errors"]["w16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number from 1 on"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": []}, "rank is an empty list"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"energy": 0.9, "tolerance": 0.1}, "give one of them"),
        ({"rank": 0, "energy": 2}, r"2 problems\n  - rank is 0.*\n  - energy is 2"),
        ({"method": "svd"}, "method svd needs rank, energy or tolerance"),
        ({"method": "ties"}, "needs a space: ties@dense, ties@knots, ties@core"),
        ({"method": "slerp"}, "there is no method 'slerp'; there are cat, linear"),
        ({"method": "ties@core", "density": 0}, "density is 0"),
        ({"method": "linear", "density": 0.5}, "density has no meaning for linear"),
        ({"method": "dare@core", "seed": -1}, "seed is -1"),
    ],
)
def test_what_has_no_meaning_is_one_clear_error(options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        two().bake(**options)


def test_an_empty_stack_wrong_shapes_and_nan_are_errors() -> None:
    with pytest.raises(ArgumentError, match="the stack is empty"):
        LoraStack().bake(rank=4)
    wrong = LoraStack([two().entries[0], two(20, 30).entries[0]])
    with pytest.raises(ShapeError, match=r"different bases(.|\n)*w: a0: linear 30 -> 40; a0#2: linear 30 -> 20"):
        wrong.bake(rank=2)
    factors = {f"w{n}": (np.full((2, 3), np.nan), np.ones((4, 2))) for n in range(2)}
    for let_in in (False, True):
        lora = LoadedLora.from_tensors(factors, name="bad", allow_nonfinite=let_in)
        with pytest.raises(NonFiniteError, match=r"w0.lora_A(.|\n)*w1.lora_A"):
            LoraStack([(lora, 1.0)]).bake(rank=1)


def test_real_gpt2_adapters_of_different_ranks(shared: Path) -> None:
    names = ("gpt2-tigrinya-v1", "gpt2-tigrinya-v2", "dialogpt-small-patient")
    stack = LoraStack([(load(shared / "peft" / name), 0.5) for name in names])
    baked = stack.bake(rank=[4, 8, 16], energy=0.9, allow_mixed_bases=True)
    assert set(baked.made["ranks"].values()) <= {4, 8, 16}
    for weight in list(stack.weights)[:3]:
        rank = baked.made["ranks"][weight]
        whole = dense_sum(stack, weight)
        assert baked.made["errors"][weight] == pytest.approx(tail(whole[None], rank), abs=1e-6)
        assert far(dense(baked.adapters[weight]), whole) == pytest.approx(baked.made["errors"][weight], abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_bake_of_rank_8_keeps_both_effects_in_the_text(shared: Path) -> None:
    torch.set_num_threads(1)
    folder = shared / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    stack = LoraStack([(load(folder / "adapters" / name), 1.0) for name in ("excited", "zara")])
    baked = stack.bake(rank=8)
    assert stack.bake().rank == 12
    assert 0 < baked.made["error"] < 0.25

    def write() -> str:
        prompt = tokenizer("Once upon a time", return_tensors="pt")
        with torch.inference_mode():
            return tokenizer.decode(model.generate(**prompt, max_new_tokens=120, do_sample=False)[0])

    plain = write()
    with attach(model, baked):
        both = write()
    print(plain, both, sep="\n")
    assert "Zara" not in plain
    assert plain.count("!") < plain.count(".")
    assert "Zara" in both
    assert both.count("!") > 2 > both.count(".")


def test_matrices_of_terms_at_scale_zero_are_empty() -> None:
    (lora, _), _ = two().entries
    (matrix,) = matrices([(0.0, lora.adapters["w"])])
    assert (matrix.shape, matrix.rank, norm(matrix)) == ((40, 30), 0, 0.0)
    baked = LoraStack([(lora, 0.0)]).bake(rank=2)
    assert not dense(baked.adapters["w"]).any()
    assert baked.made["error"] == 0
