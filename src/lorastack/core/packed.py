"""PackedWeight: the updates of several adapters at one weight, concatenated once.

``y = B_all @ (s * (A_all @ x))``: two products however many adapters there are. ``A_all [R, in]`` and
``B_all^T [R, out]`` are both row-major, so that the rows of a subset of adapters are a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lorastack.core.delta import LoraDelta, check_input, in_type, multiplier, read_all
from lorastack.errors import ShapeError

Term = tuple[float, LoraDelta]


class PackedWeight:
    """The sum of ``scale * delta`` at one weight, ready to apply. Frozen; safe to share between threads.

    Parameters
    ----------
    terms
        ``(scale, delta)`` in the order pushed, at least one; every delta must have the same shape.
    names
        The adapters' names, for messages.
    dtype
        float32 or float64.
    """

    def __init__(self, terms: Sequence[Term], names: Sequence[str], dtype: type = np.float32) -> None:
        self.check(terms, names)
        self.terms = terms
        self.names = names
        self.first = terms[0][1]
        self.dtype = np.dtype(dtype)
        # An entry at scale 0 adds nothing, also where it holds NaN or Inf that was let in.
        active = [(scale, delta) for scale, delta in terms if scale != 0]
        read_all([delta for _, delta in active])
        axis = 1 if self.first.num_experts else 0
        self.s = np.concatenate(
            [np.full(d.rank, multiplier(scale, d.scaling, self.dtype), dtype) for scale, d in active]
            or [np.zeros(0, dtype)]
        )
        a, b = ([in_type(d.factors[n].array, self.dtype, d.factors[n].label) for _, d in active] for n in (0, 1))
        self.a = self._join(a, axis)
        self.b = self._join([np.swapaxes(part, -1, -2) if part.ndim < 4 else part for part in b], axis)
        if self.first.kind == "embedding":
            # Rows are looked up by token id, so a token's row must lie together.
            self.a = np.ascontiguousarray(self.a.T)
        self._plain = self.first.kind == "linear" and dtype is np.float32
        self.in_features = self.first.in_features
        self.out_features = self.first.out_features

    def _join(self, parts: list[np.ndarray], axis: int) -> np.ndarray:
        if not parts:
            return np.zeros((0, 0), self.dtype)
        if len(parts) == 1:  # one float32 factor is not copied
            return np.ascontiguousarray(parts[0], self.dtype)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        joined = np.empty(shape, self.dtype)
        start = 0
        for part in parts:
            stop = start + part.shape[axis]
            joined[(slice(None),) * axis + (slice(start, stop),)] = part
            start = stop
        return joined

    @cached_property
    def other(self) -> PackedWeight:
        """The same in float64, for float64 input; or in float32, where float64 came first."""
        return PackedWeight(self.terms, self.names, np.float32 if self.dtype == np.float64 else np.float64)

    def apply(self, x: np.ndarray, out_features: int | None = None) -> np.ndarray:
        """The sum applied to ``x [..., in]``: ``[..., out]`` in float32, or float64 for float64 input."""
        if out_features is not None and out_features != self.out_features:
            found = ", ".join(f"{n} has {self.out_features}" for n in self.names)
            raise ShapeError(f"out_features is {out_features}, but {found} ({self.in_features} -> {self.out_features})")
        if self._plain and x.ndim == 1 and x.dtype == np.float32 and x.shape[0] == self.in_features and self.s.size:
            h = np.dot(self.a, x)
            h *= self.s
            return np.dot(h, self.b)
        if (x.dtype == np.float64) != (self.dtype == np.float64):
            return self.other.apply(x)
        check_input(x, self.first)
        lead = x.shape if self.first.kind == "embedding" else x.shape[:-1]
        if not self.s.size:
            return np.zeros((*lead, self.out_features), self.dtype)
        if self.first.kind == "embedding":
            h = self.a[x.reshape(-1)]
        else:
            x = x.astype(self.dtype, copy=False)
            flat = x.reshape((x.shape[0], -1, x.shape[-1]) if self.first.num_experts else (-1, x.shape[-1]))
            h = flat @ np.swapaxes(self.a, -1, -2)
        h *= self.s
        return (h @ self.b).reshape(*lead, self.out_features)

    @staticmethod
    def check(terms: Sequence[Term], names: Sequence[str]) -> None:
        """ShapeError unless all deltas are of one kind and one shape."""
        seen = {(d.kind, *_shape_without_rank(d)) for _, d in terms}
        if len(seen) > 1:
            raise ShapeError(
                "the adapters disagree on the shape of this weight; they were made for different bases",
                [
                    f"{name}: {d.kind} {d.in_features} -> {d.out_features}"
                    + (f", {d.num_experts} experts" if d.num_experts else "")
                    for name, (_, d) in zip(names, terms, strict=True)
                ],
            )


def _shape_without_rank(delta: LoraDelta) -> tuple[object, ...]:
    kernel = delta.factors[0].shape[2:] if delta.kind == "conv" else ()
    return delta.in_features, delta.out_features, delta.num_experts, kernel
