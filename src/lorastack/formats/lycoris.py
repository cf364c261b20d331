"""LyCORIS: the updates of LoCon with a core, LoHa and LoKr as products ``B @ A`` of two factors, where they are that.

The formulas are LyCORIS's own (lycoris/functional: locon.py, loha.py, lokr.py, general.py ``rebuild_tucker``); Yeh et
al. 2023, arXiv:2309.14859. Nothing is read but when a factor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from lorastack.core.delta import Kind, LoraDelta
from lorastack.core.factor import Factor
from lorastack.core.kronecker import Kronecker

#: Numbers of one factor that is made of others: more than any layer has.
_MOST = 1 << 31


class UnreadError(Exception):
    """Why the tensors of one module are no update that is read."""


class Expansion(NamedTuple):
    """How an update is built that the file has in another form; ``rank`` is the one that alpha is divided by."""

    build: Callable[[float], LoraDelta]
    alpha: str | None
    rank: int
    out: int
    dimensions: int = 2
    #: What it is called, and the rank it has as a plain update.
    what: str = ""
    made: int = 0


def expand(parts: Mapping[str, Factor], alpha: str | None) -> Expansion | Kronecker:
    """The update that these parts of one module are; of two full factors of LoKr, their product as it is.

    ``alpha`` is the key of its alpha.

    Raises
    ------
    UnreadError
        Saying what is missing, too much, or does not fit.
    """
    names = set(parts)
    if names == {"down", "up", "mid"}:
        return _core(parts, alpha)
    if any(name.startswith("hada_") for name in names):
        return _hadamard(parts, alpha)
    if any(name.startswith("lokr_") for name in names):
        return _kronecker(parts, alpha)
    have, lacks = ("lora_down", "lora_up") if "down" in names else ("lora_up", "lora_down")
    if names in ({"down"}, {"up"}):
        raise UnreadError(f"it has {have} but no {lacks}; save the adapter again")
    raise UnreadError(f"its tensors {', '.join(sorted(names))} are no whole update")


def _wanted(parts: Mapping[str, Factor], names: set[str], what: str) -> None:
    if missing := names - set(parts):
        raise UnreadError(f"of {what} it lacks {', '.join(sorted(missing))}; save the adapter again")
    if more := set(parts) - names:
        raise UnreadError(f"beside {what} it has {', '.join(sorted(more))}")


def _fit(good: bool, parts: Mapping[str, Factor]) -> None:
    if not good:
        raise UnreadError(
            "its factors do not fit: " + ", ".join(f"{name} {f.shape}" for name, f in sorted(parts.items()))
        )


def _core(parts: Mapping[str, Factor], alpha: str | None) -> Expansion:
    """A convolution with a core between its factors: ``A[i] = sum_j mid[i, j] down[j]``."""
    down, up, mid = parts["down"], parts["up"], parts["mid"]
    d, u, m = down.shape, up.shape, mid.shape
    _fit(len(d) == len(u) == len(m) > 2 and d[2:] == u[2:] == (1,) * len(d[2:]) and m[:2] == (u[1], d[0]), parts)
    shape = (m[0], d[1], *m[2:])

    def read() -> np.ndarray:
        flat = _float(mid).reshape(m[0], m[1], -1)
        return np.einsum("ijk,jn->ink", flat, _float(down).reshape(d[0], d[1])).reshape(shape)

    a = _made(shape, read, down, mid)
    return Expansion(lambda s: LoraDelta(a, up, s, "conv"), alpha, d[0], u[0], len(d), "a LoCon with a core", m[0])


def _hadamard(parts: Mapping[str, Factor], alpha: str | None) -> Expansion:
    """``(w1_a w1_b) * (w2_a w2_b)``, elementwise: each of r * r products of columns with products of rows.

    No rank above the smaller side: from there on, one factor is the identity.
    """
    tucker = "hada_t1" in parts or "hada_t2" in parts
    _wanted(
        parts, {f"hada_w{n}_{h}" for n in "12" for h in "ab"} | ({"hada_t1", "hada_t2"} if tucker else set()), "LoHa"
    )
    one, two = (_pair_of(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}" if tucker else None) for n in "12")
    _fit(one.kernel == two.kernel and one.out == two.out and one.columns == two.columns, parts)
    out, columns = one.out, one.columns
    rank = min(one.rank * two.rank, out, columns)
    width = columns // math.prod(one.kernel)
    sizes = (rank, width, *one.kernel), (out, rank, *(1 for _ in one.kernel))
    _limit(sizes)
    every = list(parts.values())
    if one.rank * two.rank <= min(out, columns):

        def rows() -> np.ndarray:
            return _products(one.right().T, two.right().T).T.reshape(sizes[0])

        def lefts() -> np.ndarray:
            return _products(one.left(), two.left()).reshape(sizes[1])

        a, b = _made(sizes[0], rows, *every), _made(sizes[1], lefts, *every)
    else:

        def dense() -> np.ndarray:
            return (one.left() @ one.right()) * (two.left() @ two.right())

        eye = partial(np.eye, rank, dtype=np.float32)
        wide = out <= columns
        a = _made(sizes[0], lambda: (dense() if wide else eye()).reshape(sizes[0]), *every)
        b = _made(sizes[1], lambda: (eye() if wide else dense()).reshape(sizes[1]), *every)
    kind: Kind = "conv" if one.kernel else "linear"
    return Expansion(lambda s: LoraDelta(a, b, s, kind), alpha, one.rank, out, 2 + len(one.kernel), "LoHa", rank)


def _products(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The products of every column of the one with every column of the other, row by row."""
    return (one[:, :, None] * two[:, None, :]).reshape(one.shape[0], -1)


class _Pair(NamedTuple):
    """A product ``left [out, rank] @ right [rank, columns]``, read when asked for; ``kernel`` is part of columns."""

    left: Callable[[], np.ndarray]
    right: Callable[[], np.ndarray]
    out: int
    rank: int
    columns: int
    kernel: tuple[int, ...]


def _pair_of(parts: Mapping[str, Factor], a: str, b: str, core: str | None) -> _Pair:
    """Two factors, or two with a core of a convolution between them, as a product.

    With a core ``[i, j, *kernel]`` LyCORIS keeps ``a`` as ``[i, out]`` and ``b`` as ``[j, in]``.
    """
    left, right = parts[a], parts[b]
    if core is None:
        _fit(len(left.shape) == 2 and len(right.shape) >= 2 and left.shape[1] == right.shape[0], parts)
        columns, kernel = math.prod(right.shape[1:]), right.shape[2:]
        return _Pair(
            lambda: _float(left),
            lambda: _float(right).reshape(right.shape[0], -1),
            left.shape[0],
            left.shape[1],
            columns,
            kernel,
        )
    middle = parts[core]
    m = middle.shape
    _fit(len(left.shape) == len(right.shape) == 2 and len(m) > 2 and m[:2] == (left.shape[0], right.shape[0]), parts)

    def rows() -> np.ndarray:
        return np.einsum("ijk,jn->ink", _float(middle).reshape(m[0], m[1], -1), _float(right)).reshape(m[0], -1)

    return _Pair(lambda: _float(left).T, rows, left.shape[1], m[0], right.shape[1] * math.prod(m[2:]), m[2:])


def _kronecker(parts: Mapping[str, Factor], alpha: str | None) -> Expansion | Kronecker:
    """``kron(w1, w2)``, a product of two where one of them is: ``kron(P Q, R S) = kron(P, R) kron(Q, S)``.

    Of two full factors alpha is not used, as LyCORIS does.
    """
    full = "lokr_w1" in parts, "lokr_w2" in parts
    core = "lokr_t2" if "lokr_t2" in parts else None
    wanted = {"lokr_w1"} if full[0] else {"lokr_w1_a", "lokr_w1_b"}
    wanted |= {"lokr_w2"} if full[1] else {"lokr_w2_a", "lokr_w2_b"} | ({core} if core else set())
    _wanted(parts, wanted, "LoKr")
    for name in ("lokr_w1", "lokr_w2"):
        _fit(name not in parts or 2 <= len(parts[name].shape) <= (2 if name == "lokr_w1" else 5), parts)
    if all(full):
        return Kronecker(parts["lokr_w1"], parts["lokr_w2"])
    if full[0]:
        w1 = parts["lokr_w1"]
        one, two = _trivial(w1, w1.shape[1] <= w1.shape[0]), _pair_of(parts, "lokr_w2_a", "lokr_w2_b", core)
        rank = two.rank
    else:
        one = _pair_of(parts, "lokr_w1_a", "lokr_w1_b", None)
        _fit(not one.kernel, parts)
        rank = one.rank
        if full[1]:
            w2 = parts["lokr_w2"]
            two = _trivial(w2, math.prod(w2.shape[1:]) < w2.shape[0])
        else:
            two = _pair_of(parts, "lokr_w2_a", "lokr_w2_b", core)
    made = one.rank * two.rank
    width = one.columns * two.columns // math.prod(two.kernel)
    sizes = (made, width, *two.kernel), (one.out * two.out, made, *(1 for _ in two.kernel))
    _limit(sizes)
    every = list(parts.values())
    a = _made(sizes[0], lambda: np.kron(one.right(), two.right()).reshape(sizes[0]), *every)
    b = _made(sizes[1], lambda: np.kron(one.left(), two.left()).reshape(sizes[1]), *every)
    kind: Kind = "conv" if two.kernel else "linear"
    return Expansion(
        lambda s: LoraDelta(a, b, s, kind), alpha, rank, one.out * two.out, 2 + len(two.kernel), "LoKr", made
    )


def _trivial(full: Factor, after: bool) -> _Pair:
    """A full factor as a product with the identity, ``after`` it or before."""
    rows, columns = full.shape[0], math.prod(full.shape[1:])
    rank = columns if after else rows

    def whole() -> np.ndarray:
        return _float(full).reshape(rows, columns)

    eye = partial(np.eye, rank, dtype=np.float32)
    return _Pair(whole if after else eye, eye if after else whole, rows, rank, columns, full.shape[2:])


def _limit(sizes: tuple[tuple[int, ...], ...]) -> None:
    if any(math.prod(size) > _MOST for size in sizes):
        raise UnreadError(f"as factors of a low rank it would be {sizes[0]} and {sizes[1]}, larger than any layer's")


def _float(factor: Factor) -> np.ndarray:
    return factor.take().astype(np.float32)


def _made(shape: tuple[int, ...], read: Callable[[], np.ndarray], *of: Factor) -> Factor:
    """A factor that is made of others when it is read; it is worth writing in their type."""
    first = of[0]
    label = first.label.rpartition(".")[0] or first.label
    return Factor(shape, np.dtype(np.float32), read, label, any(f.allow_nonfinite for f in of), first.stored)
