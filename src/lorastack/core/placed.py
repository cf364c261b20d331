"""Placed factors: parts of several updates put into one factor, which is zero elsewhere and is read when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from lorastack.core.factor import Factor
from lorastack.errors import Failures

#: A factor, what it is multiplied by, and where it lies in the whole.
Place: TypeAlias = tuple[Factor, float, tuple[int | slice, ...]]


def placed(shape: tuple[int, ...], places: Sequence[Place]) -> Factor:
    """A factor that is zero but for its parts, put together when it is read.

    >>> one = Factor.of(np.ones((1, 2)), "one")
    >>> placed((2, 3), [(one, 2.0, (slice(0, 1), slice(0, 2)))]).array.tolist()
    [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    kinds = {factor.dtype for factor, _, _ in places}
    plain = len(kinds) == 1 and all(times == 1.0 for _, times, _ in places)
    dtype = kinds.pop() if plain else np.dtype(np.float32)

    def read() -> np.ndarray:
        whole = np.zeros(shape, dtype)
        failures = Failures("factors that are put together cannot be used")
        for factor, times, at in places:
            part = failures.get(partial(factor.cast, times, dtype))
            if part is not None:
                whole[at] = part
        failures.raise_any()
        return whole

    first = places[0][0]
    return Factor(shape, dtype, read, first.label, any(f.allow_nonfinite for f, _, _ in places), first.stored)


def common_scaling(scalings: Sequence[float]) -> float:
    """The scaling of all, where it is one; else 1, and each is folded into its B."""
    return scalings[0] if len(set(scalings)) == 1 else 1.0


def folded(scaling: float, common: float) -> float:
    """What a B is multiplied by where ``common`` is the scaling of the whole."""
    return 1.0 if scaling == common else scaling
