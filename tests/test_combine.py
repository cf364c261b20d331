"""Methods by entry: each against its plain dense definition in float64, and blind to how updates are factored."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_prune as peft_prune
from peft.utils.merge_utils import ties as peft_ties

from lorastack import LoadedLora, LoraStack
from lorastack.algebra.method import METHODS
from lorastack.algebra.rules import thresholds
from tests.test_bake import dense
from tests.test_compress import dense_sum, far, two

BY_ENTRY = [name for name in METHODS if "@" in name]


def parts_of(stack: LoraStack) -> list[np.ndarray]:
    return [scale * dense(delta) for scale, delta in stack.terms("w")]


def trimmed(part: np.ndarray, density: float) -> np.ndarray:
    keep = max(1, round(density * part.size))
    return np.where(np.abs(part) >= np.sort(np.abs(part), axis=None)[-keep] * (1 - 1e-6), part, 0)


def plain_ties(parts: list[np.ndarray], density: float) -> np.ndarray:
    cut = np.array([trimmed(part, density) for part in parts])
    sign = np.sign(cut.sum(0))
    agree = (np.sign(cut) == sign) & (sign != 0)
    return (cut * agree).sum(0) / np.maximum(agree.sum(0), 1)


def plain_prune(parts: list[np.ndarray], density: float) -> np.ndarray:
    return sum(trimmed(part, density) for part in parts)  # type: ignore[return-value]


def in_knots(parts: list[np.ndarray], rule: Callable, density: float) -> np.ndarray:
    """The paper's words: the SVD of all side by side, the rule on the parts of Σ V^T, and back."""
    u, sigma, vt = np.linalg.svd(np.concatenate(parts, 1), full_matrices=False)
    keep = sigma > 1e-10 * sigma[0]
    blocks = np.split(sigma[keep, None] * vt[keep], len(parts), 1)
    return u[:, keep] @ rule(blocks, density)


def in_core(parts: list[np.ndarray], rule: Callable, density: float) -> np.ndarray:
    """The paper's words on balanced factors."""
    factored = []
    for part in parts:
        u, sigma, vt = np.linalg.svd(part, full_matrices=False)
        keep = sigma > 1e-10 * sigma[0]
        factored.append((u[:, keep] * np.sqrt(sigma[keep]), np.sqrt(sigma[keep, None]) * vt[keep]))
    ub, sb, _ = np.linalg.svd(np.concatenate([b for b, _ in factored], 1), full_matrices=False)
    _, sa, va = np.linalg.svd(np.concatenate([a for _, a in factored]), full_matrices=False)
    ub, va = ub[:, sb > 1e-10 * sb[0]], va[sa > 1e-10 * sa[0]]
    return ub @ rule([ub.T @ b @ a @ va.T for b, a in factored], density) @ va


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), density=st.sampled_from([0.1, 0.2, 0.5, 1.0]), third=st.booleans())
@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
def test_trimming_methods_are_their_dense_definitions(rule, seed, density, third) -> None:
    stack = two(14, 11, (2, 3, 1) if third else (2, 3), seed)
    plain = {"ties": plain_ties, "magnitude_prune": plain_prune}[rule]
    parts = parts_of(stack)
    for space, expected in (
        ("dense", plain(parts, density)),
        ("knots", in_knots(parts, plain, density)),
        ("core", in_core(parts, plain, density)),
    ):
        baked = stack.bake(method=f"{rule}@{space}", density=density, rank=11 if space == "dense" else None)
        assert far(dense(baked.adapters["w"]), expected) < 2e-5, space
        assert baked.made["error"] < 1e-5


def test_dense_rules_are_those_of_peft() -> None:
    """On the dense updates of one weight, which is what PEFT's functions get in its *_svd variants."""
    stack = LoraStack([(lora, 1.0) for lora, _ in two(24, 18, (3, 4)).entries])
    tensors = [torch.from_numpy(dense(delta)) for _, delta in stack.terms("w")]
    ones = torch.ones(2, dtype=torch.float64)
    found = stack.bake(method="ties@dense", density=0.25, rank=18)
    assert far(dense(found.adapters["w"]), peft_ties(tensors, ones, 0.25).numpy()) < 1e-5
    found = stack.bake(method="magnitude_prune@dense", density=0.25, rank=18)
    assert far(dense(found.adapters["w"]), peft_prune(tensors, ones, 0.25).numpy()) < 1e-5


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 9999))
@pytest.mark.parametrize("method", ["linear", "svd", *BY_ENTRY])
def test_the_same_updates_give_the_same_however_they_are_factored(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stack = two(24, 18, (3, 4), seed)
    turned = LoraStack()
    for lora, scale in stack.entries:
        delta = lora.adapters["w"]
        turn = rng.standard_normal((delta.rank, delta.rank)) + 2 * np.eye(delta.rank)
        factors = np.linalg.solve(turn, delta.a), delta.b @ turn
        turned.push(LoadedLora.from_tensors({"w": factors}), scale)
    cut = {"rank": 5} if method == "svd" else {}
    first, second = (dense(s.bake(method=method, **cut).adapters["w"]) for s in (stack, turned))
    assert far(second, first) < 1e-3  # an entry at the very threshold may fall on either side of it


def test_methods_on_a_and_b_separately_do_depend_on_the_factors() -> None:
    """Why they are not offered: TIES of PEFT moves by its own size, and its linear is not the sum."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8, 256)), rng.standard_normal((2, 256, 8))
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    ones = torch.ones(2, dtype=torch.float64)

    def by_factor(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        merged = [peft_ties(list(torch.from_numpy(half)), ones, 0.2).numpy() for half in (b, a)]
        return merged[0] @ merged[1]

    turned = np.stack([turn.T @ a[0], a[1]]), np.stack([b[0] @ turn, b[1]])
    assert far(by_factor(*turned), by_factor(a, b)) > 0.5
    assert far(b.sum(0) @ a.sum(0), (b @ a).sum(0)) > 0.5


@pytest.mark.parametrize("space", ["dense", "knots", "core"])
def test_dare_is_seeded_and_its_mean_is_the_sum(space: str) -> None:
    stack = two(10, 8, (2, 2))
    options = {"method": f"dare@{space}", "density": 0.5, "rank": 4 if space != "dense" else 8}
    baked = [dense(stack.bake(seed=seed, **options).adapters["w"]) for seed in range(400)]
    assert np.array_equal(baked[7], dense(stack.bake(seed=7, **options).adapters["w"]))
    assert far(baked[1], baked[0]) > 0.1
    assert far(np.mean(baked, 0), dense_sum(stack, "w")) < 4 / np.sqrt(400)
    if space == "dense":
        parts = parts_of(stack)
        allowed = np.array([m0 * parts[0] / 0.5 + m1 * parts[1] / 0.5 for m0 in (0, 1) for m1 in (0, 1)])
        nearest = np.abs(baked[3] - allowed).min(0)
        assert nearest.max() < 1e-5, "every entry is dropped or doubled"


@pytest.mark.parametrize("space", ["dense", "knots", "core"])
def test_everything_kept_is_the_sum(space: str) -> None:
    stack = two(14, 11, (2, 3))
    for rule in ("dare", "magnitude_prune"):
        baked = stack.bake(method=f"{rule}@{space}", density=1.0)
        assert far(dense(baked.adapters["w"]), dense_sum(stack, "w")) < 1e-5


def test_a_threshold_is_that_of_an_adapters_whole_update() -> None:
    rng = np.random.default_rng(0)
    tensors = {n: (rng.standard_normal((2, 9)), rng.standard_normal((9, 2)) * s) for n, s in (("big", 1e3), ("low", 1))}
    stack = LoraStack([(LoadedLora.from_tensors(tensors), 1.0)])
    baked = stack.bake(method="magnitude_prune@dense", density=0.4, rank=9)
    assert not dense(baked.adapters["low"]).any()
    assert dense(baked.adapters["big"]).any()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 9999),
)
def test_thresholds_are_exact_order_statistics(sizes, density, seed) -> None:
    rng = np.random.default_rng(seed)
    chunks = [(n % 2, np.round(rng.standard_normal(size), 1).astype(np.float32)) for n, size in enumerate(sizes)]
    found = thresholds(lambda: iter(chunks), 1 + (len(sizes) > 1), density)
    for part, threshold in enumerate(found):
        every = np.sort(np.abs(np.concatenate([entries for which, entries in chunks if which == part])))
        assert threshold == every[-max(1, round(density * len(every)))]


def test_experts_and_weights_of_one_adapter_only() -> None:
    rng = np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors({"e": (rng.standard_normal((3, 2, 7)), rng.standard_normal((3, 5, 2)))} | more)
        for more in ({}, {"own": (rng.standard_normal((2, 7)), rng.standard_normal((5, 2)))})
    ]
    stack = LoraStack([(loras[0], 0.5), (loras[1], 1.5)])
    for method in BY_ENTRY:
        baked = stack.bake(method=method, density=1.0, rank=[1, 2, 3, 4, 5] if "dense" in method else None, tolerance=0)
        assert dense(baked.adapters["e"]).shape == (3, 5, 7)
        if not method.startswith("dare_ties") and not method.startswith("ties"):
            assert far(dense(baked.adapters["e"]), dense_sum(stack, "e")) < 1e-5
        assert far(dense(baked.adapters["own"]), dense_sum(stack, "own")) < 1e-5


def test_dense_methods_stay_within_a_tile_of_memory() -> None:
    stack = two(4096, 4096, (4, 4))
    tracemalloc.start()
    baked = stack.bake(method="ties@dense", rank=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20, f"{peak / 2**20:.0f} MiB; the whole has 128 in float64"
    assert 0 < baked.made["error"] < 1


def test_the_reported_error_of_a_dense_method_is_the_true_one() -> None:
    stack = two(60, 50, (3, 3))
    whole = plain_ties(parts_of(stack), 0.2)
    baked = stack.bake(method="ties@dense", rank=6)
    assert baked.made["error"] == pytest.approx(far(dense(baked.adapters["w"]), whole), abs=1e-5)
    sigma = np.linalg.svd(whole, compute_uv=False)
    best = np.sqrt((sigma[6:] ** 2).sum() / (sigma**2).sum())
    assert baked.made["error"] == pytest.approx(best, rel=1e-3)
