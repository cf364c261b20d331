"""Rounding: merged numbers in the type they are stored in, each rounded once, to the nearest or at random."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from lorastack.errors import ArgumentError
from lorastack.ways import argument

WAYS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Rounding:
    """How numbers are rounded: ``nearest`` (ties to even), or ``stochastic``, which keeps the mean.

    Raises
    ------
    ArgumentError
        When there is no such way.
    """

    way: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ArgumentError(f"{argument('round')} is {self.way!r}, expected {' or '.join(WAYS)}")

    def to(self, array: np.ndarray, dtype: np.dtype, name: str = "", block: int = 0) -> np.ndarray:
        """``array``, float32 or float64, in ``dtype``; a block of a tensor always meets the same random numbers.

        >>> third = Rounding("stochastic").to(np.full(30000, 1 / 3, np.float32), np.dtype(np.float16))
        >>> len(set(third.tolist())), round(float(third.astype(np.float64).mean()), 6)
        (2, 0.333333)
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if self.way == "stochastic":
                return _at_random(array, dtype, np.random.default_rng([self.seed, zlib.crc32(name.encode()), block]))
            if array.dtype == np.float64 and dtype.name == "bfloat16":
                array = _to_odd(array)  # the way to bfloat16 leads through float32, which would round a first time
            return array.astype(dtype)


def _at_random(array: np.ndarray, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """One of the two neighbours in ``dtype``, the nearer one the more often (Gupta et al. 2015, arXiv:1502.02551)."""
    near = array.astype(dtype)
    wide = near.astype(array.dtype)
    miss = array - wide
    other = np.nextafter(near, np.where(miss > 0, np.inf, -np.inf).astype(dtype))
    gap = np.abs(other.astype(array.dtype) - wide)
    odds = np.divide(np.abs(miss), gap, out=np.zeros_like(miss), where=np.isfinite(gap) & (gap > 0))
    return np.where(rng.random(array.shape, np.float32) < odds, other, near)


def _to_odd(array: np.ndarray) -> np.ndarray:
    """float64 as float32 with the last bit set where anything was lost: rounded again it is as if rounded once."""
    narrow = array.astype(np.float32)
    wide = narrow.astype(np.float64)
    bits = narrow.view(np.uint32)
    bits = np.where(np.abs(wide) > np.abs(array), bits - 1, bits)
    exact = (wide == array) | ~np.isfinite(wide)
    return np.where(exact, narrow.view(np.uint32), bits | np.uint32(1)).astype(np.uint32).view(np.float32)
