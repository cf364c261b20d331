"""The types that factors are kept and written in: their names, and casting with a multiplier folded in."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lorastack.errors import ArgumentError, FormatError
from lorastack.ways import argument

#: A scaling beyond this would be infinite in the type that updates are computed in.
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Below this, float32 has fewer digits.
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
#: What ``dtype=`` takes.
NAMES = ("f32", "f16", "bf16", "q8_0")


def numpy_type(name: str) -> np.dtype:
    """The NumPy dtype of ``f32``, ``f16`` or ``bf16``."""
    if name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"f32": np.float32, "f16": np.float16}[name])


#: What others call them.
_OTHERS = {
    "fp32": "f32", "float32": "f32", "float": "f32",
    "fp16": "f16", "float16": "f16", "half": "f16",
    "bfloat16": "bf16",
}  # fmt: skip


def our_name(name: str) -> str:
    """Our name of a type that may be called as others do, in any case.

    >>> our_name("fp16"), our_name("BF16"), our_name("torch.float32"), our_name("int4")
    ('f16', 'bf16', 'f32', 'int4')
    """
    plain = name.lower().removeprefix("torch.")
    return _OTHERS.get(plain, plain)


def checked_name(name: str | None, allowed: tuple[str, ...] = NAMES) -> str | None:
    """Our name of the type, one of ``allowed``; None stays; ArgumentError for any other."""
    if name is None or (found := our_name(name)) in allowed:
        return None if name is None else found
    raise ArgumentError(f"{argument('dtype')} {name!r} cannot be written here; there are {', '.join(allowed)}")


def short_name(stored: str) -> str:
    """Our short name of the type that holds a factor of this stored type without loss."""
    return {"F16": "f16", "float16": "f16", "BF16": "bf16", "bfloat16": "bf16", "Q8_0": "q8_0"}.get(stored, "f32")


@lru_cache(maxsize=64)
def _all_exponent_bits(dtype: np.dtype) -> int | None:
    """The bits of an infinity of a 16-bit type."""
    return {"float16": 0x7C00, "bfloat16": 0x7F80}.get(dtype.name)


def nonfinite_count(array: np.ndarray) -> int:
    """How many values are NaN or Inf."""
    top = _all_exponent_bits(array.dtype)
    # All exponent bits set means NaN or Inf; on the bare bits this is three times as fast as isfinite.
    if top and array.size and array.flags.c_contiguous and int((array.view(np.uint16) & 0x7FFF).max()) < top:
        return 0
    with np.errstate(invalid="ignore"):  # NumPy warns of a bfloat16 NaN while it looks for it
        return int(array.size - np.count_nonzero(np.isfinite(array)))


def cast(array: np.ndarray, times: float, dtype: np.dtype, label: str, whole: bool = True) -> np.ndarray:
    """``times * array`` in ``dtype``, each value rounded once from float32, or float64 where that is needed.

    Raises
    ------
    FormatError
        When a finite value becomes infinite, or all of a ``whole`` array become zero: float16 has nothing above 65504
        and below 6e-8.
    """
    if times == 1.0 and array.dtype == dtype:
        return array
    may_overflow = may_vanish = True
    if array.dtype.itemsize == 2 and array.size > 1 << 16:
        # A 16-bit type has 65536 values: a table of their results is several times as fast as computing each.
        table, may_overflow, may_vanish = _table(array.dtype, times, dtype)
        out = np.take(table, np.ascontiguousarray(array).view(np.uint16))
    else:
        out = _plain_cast(array, times, dtype)
    if may_overflow or may_vanish:
        check_kept(array, times, out, dtype.name, label, may_overflow, whole and may_vanish)
    return out


def check_kept(
    array: np.ndarray,
    times: float,
    out: np.ndarray,
    kind: str,
    label: str,
    may_overflow: bool = True,
    may_vanish: bool = True,
) -> None:
    """Raise FormatError where ``out``, which is ``times * array`` as it is written, has lost what was in it.

    ``out`` may also be the scales of a packed type.
    """
    if may_overflow and (lost := nonfinite_count(out)) and lost > nonfinite_count(array):
        what = "do not fit"
    elif may_vanish and times and not any_value(out) and any_value(array):
        what = "all become zero in"
    else:
        return
    with np.errstate(all="ignore"):
        wide = np.abs(array.astype(np.float64))
        largest = float(wide[np.isfinite(wide)].max(initial=0)) * abs(times)
    way = "use another scale" if kind == "float32" else "write it as f32 or bf16"
    raise FormatError(f"{label}: values up to {largest:g} {what} {kind}; {way}")


def any_value(array: np.ndarray) -> bool:
    """Whether a value is not zero: nearly always one of the first is."""
    with np.errstate(invalid="ignore"):  # NumPy warns of a bfloat16 NaN while it looks for one
        return bool(array[(slice(0, 8),) * array.ndim].any()) or bool(array.any())


@lru_cache(maxsize=32)
def _table(source: np.dtype, times: float, dtype: np.dtype) -> tuple[np.ndarray, bool, bool]:
    """The result for every value of a 16-bit type, and whether any finite one becomes infinite, any other one zero."""
    every = np.arange(1 << 16, dtype=np.uint16).view(source)
    table = _plain_cast(every, times, dtype)
    vanishing = times != 0 and bool(np.count_nonzero(table) < np.count_nonzero(every))
    return table, nonfinite_count(table) > nonfinite_count(every), vanishing


def _plain_cast(array: np.ndarray, times: float, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        narrow = array.dtype.itemsize <= 4 and dtype.itemsize <= 4 and _in_float32(times)
        wide = np.dtype(np.float32 if narrow else np.float64)
        return (array.astype(wide) * wide.type(times)).astype(dtype)


def _in_float32(number: float) -> bool:
    """Whether float32 holds a number to its full precision."""
    return number == 0 or FLOAT32_TINY <= abs(number) <= FLOAT32_MAX
