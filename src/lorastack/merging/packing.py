"""Packing: rows of numbers in GGML's types, by ``gguf`` where it can, else by llama.cpp's own library."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorastack.errors import MissingDependencyError

#: Types that ``gguf`` writes by itself; it reads more.
_BY_GGUF = frozenset("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4".split())
#: Types that are numbers by themselves, with NumPy's names for them.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


def packable(kind: str) -> str | None:
    """Why rows cannot be written in this type here; None when they can."""
    if kind in FLOATS or kind in _BY_GGUF:
        return None
    if kind not in gguf.GGMLQuantizationType.__members__ or "_" not in kind:
        return f"{kind} is no type of weights that is written here"
    if _library() is None:
        return f"{kind} is packed by llama.cpp's own library, which is not installed: pip install 'lorastack[llama]'"
    return None


def packable_types() -> list[str]:
    """Every type of GGUF that rows can be written in here."""
    return [name for name in gguf.GGMLQuantizationType.__members__ if packable(name) is None]


def needs_importance(kind: str) -> bool:
    """Whether llama.cpp packs this type only with an importance matrix."""
    library = None if kind in FLOATS or kind in _BY_GGUF else _library()
    return library is not None and bool(library.ggml_quantize_requires_imatrix(int(GGMLQuantizationType[kind])))


def pack(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """``rows [n, columns]`` in float32 as the bytes of a packed type.

    Parameters
    ----------
    importance
        How much each column matters, ``[columns]`` in float32: an importance matrix's line.
    """
    number = GGMLQuantizationType[kind]
    if kind in _BY_GGUF and importance is None:
        with np.errstate(all="ignore"):
            return gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), number).reshape(-1)
    library = _library()
    if library is None:
        raise MissingDependencyError(str(packable(kind)))
    rows = np.ascontiguousarray(rows, np.float32)
    block, size = GGML_QUANT_SIZES[number]
    packed: np.ndarray = np.empty(rows.size // block * size, np.uint8)
    matters = None if importance is None else np.ascontiguousarray(importance, np.float32)
    library.ggml_quantize_chunk(
        int(number),
        rows.ctypes.data_as(ctypes.c_void_p),
        packed.ctypes.data_as(ctypes.c_void_p),
        0,
        rows.shape[0],
        rows.shape[1],
        None if matters is None else matters.ctypes.data_as(ctypes.c_void_p),
    )
    return packed


@cache
def _library() -> Any:
    """libggml-base, which comes with llama-cpp-python; None where it is not installed. The package is not imported."""
    found = importlib.util.find_spec("llama_cpp")
    for folder in found.submodule_search_locations or () if found else ():
        for name in _LIBRARIES:
            path = Path(folder, "lib", name)
            if path.is_file():
                return _declared(ctypes.CDLL(str(path)))
    return None


def _declared(library: Any) -> Any:
    """ggml.h: size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)."""
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    whole = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *whole, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
