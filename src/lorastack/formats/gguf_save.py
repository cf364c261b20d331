"""Write an adapter as GGUF, so that llama.cpp computes the same thing; through ``gguf.GGUFWriter``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Q

from lorastack.core import dtypes
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import HARMLESS, KINDS, are_tokens
from lorastack.core.factor import Factor
from lorastack.errors import Failures, FormatError, Problems, is_text, shown
from lorastack.formats.gguf_left_out import left_out
from lorastack.formats.peft import RECIPE_KEY
from lorastack.ways import CONVERT, SELECT, Way, drop_extras, ways

#: GGML_MAX_NAME, the closing zero included.
_MAX_NAME = 64
#: Keys with texts that are kept.
_TEXTS = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
_MERGE = Way("merge the adapter into the GGUF base with merge()", "merge the adapter into the GGUF base")
_TYPES = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0}


class _Plain(np.ndarray):
    """An array that says why it could not be written: NumPy's own ``tofile`` loses the system's reason."""

    def tofile(self, file: Any, *_: Any) -> None:
        file.write(self.view(np.uint8).reshape(-1).data)


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: str
    factor: Factor
    times: float
    transpose: bool


def save_gguf(
    lora: LoadedLora,
    path: Path,
    dtype: str | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``lora`` to ``path``, one tensor after another; the caller moves the file to its place.

    One alpha for the file is written when alpha/rank says every weight's scaling; otherwise each
    scaling is folded into lora_B and alpha is 0, which llama.cpp reads as a scaling of 1. ``q8_0``
    falls back to float16 for factors whose rows do not fill blocks of 32, as llama.cpp's own converter does.

    Raises
    ------
    FormatError
        Listing everything that GGUF cannot hold.
    """
    dtype = dtypes.checked_name(dtype)
    _check(lora)
    alpha = uniform_alpha(lora)
    tensors = list(_tensors(lora, dtype, fold=alpha is None))
    writer = gguf.GGUFWriter(path, str(lora.metadata["general.architecture"]))
    try:
        _write_keys(writer, lora, alpha or 0.0, recipe)
        for t in tensors:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), _nbytes(t), raw_dtype=_TYPES[t.kind])
        for name, norm in lora.extras.get("norm", {}).items():
            writer.add_tensor_info(name, norm.shape, np.dtype(np.float32), 4 * math.prod(norm.shape), raw_dtype=Q.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        failures = Failures(f"{lora.name} cannot be written as GGUF")
        computed: list[Callable[[], np.ndarray]] = [partial(_data, t) for t in tensors]
        computed += [partial(_norm, norm) for norm in lora.extras.get("norm", {}).values()]
        for compute in computed:
            data = failures.get(compute)
            if data is None or failures:
                continue  # nothing will be kept; the rest is only looked at, to say all that is wrong
            writer.write_tensor_data(data.view(_Plain))
            if progress:
                progress(data.nbytes)
        failures.raise_any()
    finally:
        writer.close()


def uniform_alpha(lora: LoadedLora) -> float | None:
    """The one alpha with which alpha/rank is every weight's scaling; None when there is none.

    llama.cpp divides in float32, so that is where they must agree.
    """
    alphas = {delta.scaling * delta.rank for delta in lora.adapters.values()}
    with np.errstate(all="ignore"):
        first = np.float32(next(iter(alphas)))
        same = all(np.float32(delta.scaling) == first / np.float32(delta.rank) for delta in lora.adapters.values())
    return float(first) if same and dtypes.FLOAT32_TINY <= abs(first) <= dtypes.FLOAT32_MAX else None


def _check(lora: LoadedLora) -> None:
    problems = Problems(f"{lora.name} cannot be written as GGUF")
    if lora.naming != "gguf":
        problems.add(f"its weights do not have GGUF names{ways(CONVERT)}")
    if not lora.metadata.get("general.architecture"):
        said = ways(CONVERT, Way("say it, as in architecture='llama'", None))
        problems.add(f"the base's architecture is not known{said}")
    if not lora.adapters:
        problems.add("it has no weights")
    for name, delta in lora.adapters.items():
        if delta.kind == "conv":
            problems.add(f"weight {name} is a convolution, which GGUF adapters cannot hold")
        elif left_out(str(lora.metadata.get("general.architecture")), name):
            problems.add(f"weight {name}: llama.cpp adds no update to this tensor at run time{ways(SELECT, _MERGE)}")
        if (length := len(f"{name}.lora_a".encode(errors="replace"))) >= _MAX_NAME:
            problems.add(f"tensor {name}.lora_a: the name has {length} bytes, GGUF takes {_MAX_NAME - 1}")
    tokens = lora.extras.get("alora", {}).get("invocation_tokens") or []
    if not are_tokens(tokens):
        problems.add(f"alora: invocation_tokens is {shown(tokens)}, expected a list of token ids")
    _check_texts(lora, problems)
    for kind, values in lora.extras.items():
        if kind not in ("norm", "alora") and kind not in HARMLESS:
            first = next(iter(values))
            problems.add(f"{kind}: {KINDS[kind]}, such as {first}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)


def _check_texts(lora: LoadedLora, problems: Problems) -> None:
    said = {key: lora.metadata.get(key) for key in ("general.architecture", *_TEXTS)} | {"general.name": lora.name}
    for key, value in said.items():
        if isinstance(value, str) and not is_text(value):
            problems.add(f"key {key}: {shown(value)} is no text that UTF-8 holds; give it another name")
    for name in lora.adapters:
        if not is_text(name):
            problems.add(f"weight {shown(name)}: the name is no text that UTF-8 holds")


def _tensors(lora: LoadedLora, dtype: str | None, fold: bool) -> Iterator[_Tensor]:
    for name, delta in lora.adapters.items():
        a, b = delta.factors
        transpose = delta.kind == "embedding"  # llama.cpp looks up rows of A by token
        shape = (a.shape[1], a.shape[0]) if transpose else a.shape
        yield _Tensor(f"{name}.lora_a", shape, _kind(a, shape, dtype), a, 1.0, transpose)
        yield _Tensor(f"{name}.lora_b", b.shape, _kind(b, b.shape, dtype), b, _times(delta, fold), False)


def _times(delta: LoraDelta, fold: bool) -> float:
    return delta.scaling if fold else 1.0


def _kind(factor: Factor, shape: tuple[int, ...], dtype: str | None) -> str:
    kind = dtype or dtypes.short_name(factor.stored)
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def _nbytes(tensor: _Tensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[_TYPES[tensor.kind]]
    return math.prod(tensor.shape) // block * size


def _data(tensor: _Tensor) -> np.ndarray:
    quantised = tensor.kind == "q8_0"
    array = tensor.factor.cast(tensor.times, dtypes.numpy_type("f32" if quantised else tensor.kind))
    array = np.ascontiguousarray(array.T if tensor.transpose else array)
    return _packed(array, tensor.factor.label) if quantised else array


def _packed(array: np.ndarray, label: str) -> np.ndarray:
    """``array`` as q8_0: blocks of 32 bytes, each behind a float16 that scales it, which must hold what is in it."""
    with np.errstate(all="ignore"):
        packed = gguf.quants.quantize(array, Q.Q8_0)
    size = gguf.GGML_QUANT_SIZES[Q.Q8_0][1]
    scales = packed.reshape(-1, size)[:, :2].copy().view(np.float16)
    dtypes.check_kept(array, 1.0, scales, "q8_0", label)
    return packed


def _norm(norm: Factor) -> np.ndarray:
    return np.ascontiguousarray(norm.cast(1.0, np.dtype(np.float32)))


def _write_keys(writer: gguf.GGUFWriter, lora: LoadedLora, alpha: float, recipe: str | None) -> None:
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("general.name", lora.name)
    writer.add_float32("adapter.lora.alpha", alpha)
    for key in _TEXTS:
        if isinstance(value := lora.metadata.get(key), str):
            writer.add_string(key, value)
    if tokens := lora.extras.get("alora", {}).get("invocation_tokens"):
        writer.add_key_value("adapter.alora.invocation_tokens", list(tokens), gguf.GGUFValueType.ARRAY,
                             gguf.GGUFValueType.UINT32)  # fmt: skip
    if recipe:
        writer.add_string(RECIPE_KEY, recipe)
