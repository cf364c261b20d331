"""Factor: one of the two arrays of a low-rank update, in memory or not read yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lorastack.core.dtypes import any_value, cast, nonfinite_count
from lorastack.errors import Failures, NonFiniteError
from lorastack.ways import NONFINITE, ways


class Factor:
    """An array whose shape and dtype are known at once and whose numbers are read on first use.

    Reading checks for NaN and Inf once, then keeps the array, read-only. Several threads may read at
    the same time: both compute the same array and one of the two is kept.

    Parameters
    ----------
    shape, dtype
        What the array has when read. ``dtype`` is the stored type, in which the numbers are kept.
    read
        Called without arguments, returns the array, in memory that is no file's: a file is written to and cut short
        while it is in use.
    label
        Says where the numbers come from, for messages: file and tensor.
    allow_nonfinite
        Let NaN and Inf through.
    """

    __slots__ = ("_array", "_read", "allow_nonfinite", "dtype", "label", "shape", "stored")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[], np.ndarray],
        label: str,
        allow_nonfinite: bool = False,
        stored: str | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.label = label
        self.allow_nonfinite = allow_nonfinite
        #: Name of the type in the file, where NumPy has none for it (``Q8_0``); else NumPy's name.
        self.stored = stored or dtype.name
        self._read = read
        self._array: np.ndarray | None = None

    @classmethod
    def of(cls, array: np.ndarray, label: str, allow_nonfinite: bool = False) -> Factor:
        """A factor that is in memory already; the array is copied if someone could still write to it."""
        array = np.asarray(array)
        if array.flags.writeable:
            array = array.copy()
            array.flags.writeable = False
        return cls(array.shape, array.dtype, lambda: array, label, allow_nonfinite)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.take(), self.label, self.allow_nonfinite, self.stored)

    @property
    def array(self) -> np.ndarray:
        """The numbers, read-only, in the stored dtype (quantised types: float32).

        Raises
        ------
        NonFiniteError
            When a value is NaN or Inf and ``allow_nonfinite`` was not given.
        """
        if self._array is None:
            array = self.take()
            array.flags.writeable = False
            self._array = array
        return self._array

    def take(self) -> np.ndarray:
        """The numbers as `array` gives them, without keeping them: for one pass over a large file."""
        if self._array is not None:
            return self._array
        array = self.raw()
        bad = 0 if self.allow_nonfinite else nonfinite_count(array)
        if bad:
            raise NonFiniteError(
                f"{self.label}: {bad} of {array.size} values are NaN or Inf"
                + ways("train or save the adapter again", NONFINITE)
            )
        return array

    def raw(self) -> np.ndarray:
        """The numbers as they are stored, NaN and Inf included, for looking at a file rather than using it."""
        return self._read() if self._array is None else self._array

    def cast(self, times: float, dtype: np.dtype, whole: bool = True) -> np.ndarray:
        """``times`` the numbers in ``dtype``, each rounded once, without keeping them; see `dtypes.cast`."""
        return cast(self.take(), times, dtype, self.label, whole)

    def mapped(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Factor:
        """The same factor with ``change`` (a transpose, a reshape, a row permutation) applied when read."""
        return Factor(shape, self.dtype, lambda: change(self.take()), self.label, self.allow_nonfinite, self.stored)


def _restored(array: np.ndarray, label: str, allow_nonfinite: bool, stored: str) -> Factor:
    """A factor that was pickled, its numbers with it: where it is read there may be no such file."""
    array.flags.writeable = False
    return Factor(array.shape, array.dtype, lambda: array, label, allow_nonfinite, stored)


class JoinedFactor(Factor):
    """Factors side by side along one axis, each multiplied: joined when read, part by part, in the type asked for."""

    __slots__ = ("axis", "parts")

    def __init__(self, parts: Sequence[tuple[float, Factor]], axis: int) -> None:
        factors = [factor for _, factor in parts]
        shape = list(factors[0].shape)
        axis %= len(shape)
        shape[axis] = sum(factor.shape[axis] for factor in factors)
        kinds = {(factor.dtype, factor.stored) for factor in factors}
        dtype, stored = kinds.pop() if len(kinds) == 1 else (np.dtype(np.float32), "F32")
        if any(times != 1.0 for times, _ in parts):
            # In memory the products are kept in float32; ``stored`` still says what they are worth writing in.
            dtype = np.dtype(np.float32)
        label = " + ".join(dict.fromkeys(factor.label for factor in factors))
        self.parts, self.axis = tuple(parts), axis
        super().__init__(
            tuple(shape),
            dtype,
            lambda: self.cast(1.0, dtype, whole=False),
            label,
            any(f.allow_nonfinite for f in factors),
            stored,
        )

    def _join(self, times: float, dtype: np.dtype) -> np.ndarray:
        out = np.empty(self.shape, dtype)
        start = 0
        failures = Failures("factors that are joined cannot be used")
        for own, factor in self.parts:
            stop = start + factor.shape[self.axis]
            part = failures.get(partial(factor.cast, own * times, dtype, whole=False))
            if part is not None:
                out[(slice(None),) * self.axis + (slice(start, stop),)] = part
            start = stop
        failures.raise_any()
        return out

    def cast(self, times: float, dtype: np.dtype, whole: bool = True) -> np.ndarray:
        if len(self.parts) == 1:
            own, factor = self.parts[0]
            return factor.cast(own * times, dtype, whole)
        out = self._join(times, dtype)
        if whole and not any_value(out):
            for own, factor in self.parts:
                factor.cast(own * times, dtype)  # says where all of it became zero
        return out
