"""Scratch: memory for the numbers of one block, used again for the next: new memory costs as much as the sums in it."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np


class Scratch:
    """Arrays by name; what was in one before is lost when it is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of this shape and type, of whatever content."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, np.uint8)
        return held[:size].view(dtype).reshape(shape)


class Pool:
    """Scratch for as many threads as there are; each has one for itself while it works on a block."""

    def __init__(self) -> None:
        self._free: deque[Scratch] = deque()

    @contextlib.contextmanager
    def one(self) -> Iterator[Scratch]:
        """Yield one that nobody else has."""
        try:
            scratch = self._free.pop()
        except IndexError:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            self._free.append(scratch)
