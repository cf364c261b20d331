"""The types that factors are kept and written in: their names, and casting with a multiplier folded in."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lorastack.errors import ArgumentError, FormatError
from lorastack.ways import argument

#: A scaling beyond this would be infinite in the type that updates are computed in.
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: What ``dtype=`` takes.
NAMES = ("f32", "f16", "bf16", "q8_0")


def numpy_type(name: str) -> np.dtype:
    """The NumPy dtype of ``f32``, ``f16`` or ``bf16``."""
    if name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"f32": np.float32, "f16": np.float16}[name])


def check_name(name: str | None, allowed: tuple[str, ...] = NAMES) -> None:
    """ArgumentError unless ``name`` is None or one of ``allowed``."""
    if name is not None and name not in allowed:
        raise ArgumentError(f"{argument('dtype')} {name!r} cannot be written here; there are {', '.join(allowed)}")


def short_name(stored: str) -> str:
    """Our short name of the type that holds a factor of this stored type without loss."""
    return {"F16": "f16", "float16": "f16", "BF16": "bf16", "bfloat16": "bf16", "Q8_0": "q8_0"}.get(stored, "f32")


def nonfinite_count(array: np.ndarray) -> int:
    """How many values are NaN or Inf."""
    top = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(array.dtype.name)
    # All exponent bits set means NaN or Inf; on the bare bits this is three times as fast as isfinite.
    if top and array.size and array.flags.c_contiguous and int((array.view(np.uint16) & 0x7FFF).max()) < top:
        return 0
    with np.errstate(invalid="ignore"):  # NumPy warns of a bfloat16 NaN while it looks for it
        return int(array.size - np.count_nonzero(np.isfinite(array)))


def cast(array: np.ndarray, times: float, dtype: np.dtype, label: str) -> np.ndarray:
    """``times * array`` in ``dtype``, each value rounded once from float32.

    Raises
    ------
    FormatError
        When a finite value becomes infinite: float16 ends at 65504.
    """
    if times == 1.0 and array.dtype == dtype:
        return array
    may_overflow = dtype.itemsize == 2
    if array.dtype.itemsize == 2 and array.size > 1 << 16:
        # A 16-bit type has 65536 values: a table of their results is several times as fast as computing each.
        table, table_overflows = _table(array.dtype, times, dtype)
        may_overflow = may_overflow and table_overflows
        out = np.take(table, np.ascontiguousarray(array).view(np.uint16))
    else:
        out = _plain_cast(array, times, dtype)
    if may_overflow and out.size and nonfinite_count(out) > nonfinite_count(array):
        largest = float(np.nanmax(np.abs(array.astype(np.float32)))) * abs(times)
        raise FormatError(f"{label}: values up to {largest:g} do not fit {dtype.name}; write it as f32 or bf16")
    return out


@lru_cache(maxsize=32)
def _table(source: np.dtype, times: float, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """The result for every value of a 16-bit type, and whether any finite one becomes infinite."""
    every = np.arange(1 << 16, dtype=np.uint16).view(source)
    table = _plain_cast(every, times, dtype)
    return table, nonfinite_count(table) > nonfinite_count(every)


def _plain_cast(array: np.ndarray, times: float, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (array.astype(np.float32) * np.float32(times)).astype(dtype)
