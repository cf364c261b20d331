"""The randomised decomposition against the full one, above all where the spectrum decays slowly."""

from __future__ import annotations

import numpy as np
import pytest

from lorastack.algebra import randomised
from lorastack.algebra.randomised import leading, squared_norm, whole


def matrix(out: int, n_in: int, power: float | None, seed: int = 3) -> np.ndarray:
    """Random, with singular values ``1 / n**power``; noise alone without a power, whose spectrum is flattest."""
    rng = np.random.default_rng(seed)
    if power is None:
        return rng.standard_normal((out, n_in), np.float32)
    rank = min(out, n_in)
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (out, n_in))
    return ((u * np.arange(1.0, rank + 1) ** -power) @ v.T).astype(np.float32)


@pytest.mark.parametrize("power", [None, 0.1, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("out", "n_in", "rank"), [(300, 400, 4), (700, 400, 16), (512, 512, 32)])
def test_the_error_is_that_of_the_full_decomposition(out: int, n_in: int, rank: int, power: float | None) -> None:
    given = matrix(out, n_in, power)
    wide = given.astype(np.float64)
    best = np.sqrt(np.sum(np.linalg.svd(wide, compute_uv=False)[rank:] ** 2))
    found = leading(given, rank, np.random.default_rng(0))
    cut = found.truncated(rank)
    error = np.linalg.norm(wide - cut.b.astype(np.float64) @ cut.a.astype(np.float64))
    assert 1 - 1e-5 < error / best < 1.001
    assert np.sqrt(found.rest) == pytest.approx(error, rel=1e-4)
    assert np.allclose(found.sigma, np.linalg.svd(wide, compute_uv=False)[:rank], rtol=0.01)


def test_it_goes_on_until_nothing_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two power iterations and no more, noise is not near its best: the test above can fail."""
    given = matrix(700, 600, None)
    best = np.sum(np.linalg.svd(given, compute_uv=False)[16:].astype(np.float64) ** 2)
    monkeypatch.setattr(randomised, "_SETTLED", 1.0)
    few = leading(given, 16, np.random.default_rng(0)).rest
    monkeypatch.undo()
    more = leading(given, 16, np.random.default_rng(0)).rest
    assert 1.0 <= more / best < few / best
    assert few / best > 1.0005


def test_most_of_a_matrix_is_decomposed_in_full() -> None:
    given = matrix(60, 40, 0.5)
    found, full = leading(given, 10, np.random.default_rng(0)), whole(given, 10)
    assert found.sigma.tolist() == full.sigma.tolist()
    assert leading(given, 100, np.random.default_rng(0)).sigma.shape == (40,)


def test_a_low_rank_matrix_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    given = (rng.standard_normal((500, 3)) @ rng.standard_normal((3, 400))).astype(np.float32)
    found = leading(given, 16, rng)
    assert found.sigma.shape == (16,)
    assert np.sqrt(found.rest / squared_norm(given)) < 1e-6


def test_orthonormal_also_where_little_is_left() -> None:
    """Of a matrix of rank 1 all further directions are rounding."""
    given = np.outer(np.arange(1.0, 301), np.ones(280)).astype(np.float32)
    u, vt = leading(given, 8, np.random.default_rng(0)).vectors(8)
    assert np.allclose(u.T @ u, np.eye(8), atol=1e-4)
    assert np.allclose(vt @ vt.T, np.eye(8), atol=1e-4)


def test_a_block_that_is_nearly_in_the_basis_becomes_orthogonal_to_it() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((200, 20), np.float32))[0]
    block = basis @ rng.standard_normal((20, 5), np.float32) + 1e-6 * rng.standard_normal((200, 5), np.float32)
    beside = randomised._beside(basis, block)
    assert np.abs(basis.T @ beside).max() < 1e-5
    assert np.allclose(beside.T @ beside, np.eye(5), atol=1e-5)


def test_a_cut_holds_no_more_than_itself() -> None:
    for u in (
        whole(matrix(60, 40, 0.5), 4).vectors(4)[0],
        leading(matrix(60, 40, 0.5), 4, np.random.default_rng(0))[1](4)[0],
    ):
        assert u.base is not None
        assert u.base.nbytes == u.nbytes
