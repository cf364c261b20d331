"""Read GGUF adapters as llama.cpp defines them (src/llama-adapter.cpp), through the ``gguf`` package."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Q

from lorastack.core.adapter import LazyDeltas, LoadedLora
from lorastack.core.delta import LoraDelta, misfit
from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.gguf_header import check_header
from lorastack.formats.heads import is_gguf, unreadable

_PLAIN = frozenset({Q.F32, Q.F16, Q.F64})
_READABLE = _PLAIN | frozenset(gguf.quants._type_traits)


def load(path: Path, name: str | None = None, allow_nonfinite: bool = False) -> LoadedLora:
    """Open a GGUF adapter: the header is checked and read, the factors stay in the mapped file."""
    reader = open_reader(path)
    return _adapter(reader, path, name or path.stem, allow_nonfinite)


def open_reader(path: Path, max_elements: int | None = None) -> gguf.GGUFReader:
    """A ``GGUFReader`` on a file whose header was checked first."""
    with path.open("rb") as file:
        if not is_gguf(file.read(4)):
            raise unreadable(path, "GGUF", "no GGUF file: it does not begin with that word; fetch it again")
        if path.stat().st_size < 24:
            raise FormatError(f"{path}: {path.stat().st_size} bytes are too few for a GGUF file; it is cut short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            check_header(view, str(path), **({} if max_elements is None else {"max_elements": max_elements}))
    return _read(path)


def _read(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: the gguf package cannot read it ({error}); it is damaged") from error


def from_reader(reader: gguf.GGUFReader, name: str | None = None, allow_nonfinite: bool = False) -> LoadedLora:
    """The adapter in an open reader; see `LoadedLora.from_gguf`."""
    filename = getattr(reader.data, "filename", None)
    path = Path(filename) if filename else None
    check_header(memoryview(np.asarray(reader.data).data), str(path or "GGUF data"))
    return _adapter(reader, path, name or (path.stem if path else "lora"), allow_nonfinite)


def _adapter(reader: gguf.GGUFReader, path: Path | None, name: str, allow_nonfinite: bool) -> LoadedLora:
    label = str(path or name)
    problems = Problems(f"cannot load {label}")
    metadata = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    _check_identity(metadata, problems)
    if metadata.get("general.type") != "adapter":
        problems.raise_any(FormatError)  # a list of a whole model's tensors would bury the one thing to say
    alpha = _alpha(reader, metadata, problems)
    tokens = _invocation_tokens(metadata, problems)
    pairs, norms = _pair(reader, label, allow_nonfinite, problems)
    if not pairs and not problems:
        problems.add("it has no lora_a/lora_b tensors, so it would change nothing; convert the adapter again")
    problems.raise_any(FormatError)

    def build(weight: str, pair: tuple[Factor, Factor]) -> LoraDelta:
        a, b = pair
        kind = _kind(weight, a)
        rank = a.shape[1 if kind == "experts" else 0]
        # llama.cpp: alpha / rank of this tensor's own lora_b; no alpha, or 0, means 1.
        return LoraDelta(a, b, alpha / rank if alpha else 1.0, kind)

    extras: dict[str, Any] = {"norm": norms} if norms else {}
    if tokens:
        extras["alora"] = {"invocation_tokens": tokens}
    return LoadedLora(
        name=name,
        adapters=LazyDeltas(pairs, build),
        extras=MappingProxyType(extras),
        metadata=MappingProxyType(metadata),
        naming="gguf",
        source=path,
        files=(path,) if path else (),
        file_alpha=alpha,
    )


def _check_identity(metadata: dict[str, Any], problems: Problems) -> None:
    kind = metadata.get("general.type")
    if kind == "model" or (kind is None and "general.architecture" in metadata and "adapter.type" not in metadata):
        problems.add(
            f"key general.type: found {kind!r}, expected 'adapter'; this is a whole model, give it as the base"
        )
    elif kind != "adapter":
        problems.add(f"key general.type: found {kind!r}, expected 'adapter'; convert it with convert_lora_to_gguf.py")
    if metadata.get("adapter.type") != "lora" and kind == "adapter":
        problems.add(f"key adapter.type: found {metadata.get('adapter.type')!r}, expected 'lora'; only LoRA is read")
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        problems.add(
            f"key split.count: found {count}, expected 1; it is one part of an adapter, join the parts with "
            "llama-gguf-split"
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        problems.add(f"key general.architecture: found {architecture!r}, expected the base's, such as 'llama'")


def _alpha(reader: gguf.GGUFReader, metadata: dict[str, Any], problems: Problems) -> float | None:
    """The file's alpha; None when it has none or 0."""
    value = metadata.get("adapter.lora.alpha")
    if value is not None:
        kind = reader.fields["adapter.lora.alpha"].types[0]
        if kind != gguf.GGUFValueType.FLOAT32:
            problems.add(
                f"key adapter.lora.alpha: found {kind.name}, expected FLOAT32 (llama.cpp aborts on others); "
                "convert the adapter again"
            )
            return None
    else:
        value = metadata.get("lora.alpha")  # OxiLLaMa's key, which may be any number
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) <= FLOAT32_MAX:
        problems.add(f"alpha: found {shown(value)}, expected a finite number; convert the adapter again")
        return None
    return float(value) or None


def _invocation_tokens(metadata: dict[str, Any], problems: Problems) -> tuple[int, ...]:
    """The tokens after which an activated LoRA acts; none for any other."""
    key = "adapter.alora.invocation_tokens"
    value = metadata.get(key, [])
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        problems.add(f"key {key}: found {shown(value)}, expected a list of token ids; convert the adapter again")
        return ()
    return tuple(value)


def _pair(
    reader: gguf.GGUFReader, label: str, allow_nonfinite: bool, problems: Problems
) -> tuple[dict[str, tuple[Factor, Factor]], dict[str, Factor]]:
    """Match every lora_a with its lora_b; returns the pairs by weight, and the norms."""
    halves: dict[str, dict[str, Factor]] = {}
    norms: dict[str, Factor] = {}
    refused: set[str] = set()
    for tensor in reader.tensors:
        weight, _, part = tensor.name.rpartition(".")
        before = len(problems.lines)
        if tensor.tensor_type not in _READABLE:
            problems.add(f"tensor {tensor.name}: found type {tensor.tensor_type.name}, expected floats or quants")
        elif reader.byte_order == "S" and tensor.tensor_type not in _PLAIN:
            # gguf's own writer leaves packed types as they are, its gguf_convert_endian.py swaps them.
            problems.add(
                f"tensor {tensor.name}: {tensor.tensor_type.name} in a file of the other byte order, where only "
                "F32, F16 and F64 are read; write it in this machine's"
            )
        elif part in ("lora_a", "lora_b") and weight.endswith(".weight") and weight != "rope_freqs.weight":
            halves.setdefault(weight, {})[part] = _factor(tensor, label, allow_nonfinite)
        elif tensor.name.endswith("_norm.weight"):
            norms[tensor.name] = _factor(tensor, label, allow_nonfinite)
        else:
            problems.add(f"tensor {tensor.name}: expected NAME.weight.lora_a or NAME.weight.lora_b; remove it")
        if len(problems.lines) > before:
            refused.add(weight)
    pairs: dict[str, tuple[Factor, Factor]] = {}
    for weight, found in halves.items():
        if len(found) == 1:
            (has,) = found
            lacks = "lora_b" if has == "lora_a" else "lora_a"
            if weight not in refused:
                problems.add(f"tensor {weight}.{has} has no {weight}.{lacks}; convert the adapter again")
            continue
        a, b = found["lora_a"], found["lora_b"]
        if weight == "token_embd.weight" and len(a.shape) == 2:
            # Stored (vocabulary, rank), since llama.cpp looks rows up; kept (rank, vocabulary) here.
            a = a.mapped(np.transpose, (a.shape[1], a.shape[0]))
        problem = misfit(a.shape, b.shape, _kind(weight, a))
        if problem:
            problems.add(f"weight {weight}: {problem}; the file is damaged or of another base")
        pairs[weight] = (a, b)
    return pairs, norms


def _kind(weight: str, a: Factor) -> Any:
    if weight == "token_embd.weight":
        return "embedding"
    return "experts" if len(a.shape) == 3 else "linear"


def _factor(tensor: gguf.ReaderTensor, label: str, allow_nonfinite: bool) -> Factor:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    kind = tensor.tensor_type
    data = np.asarray(tensor.data)
    if kind in _PLAIN:
        dtype = data.dtype.newbyteorder("=")
        read = data.view if data.dtype == dtype else lambda: data.astype(dtype)
    elif kind == Q.BF16:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)

        def read() -> np.ndarray:
            return data.view(dtype)

    else:
        dtype = np.dtype(np.float32)

        def read() -> np.ndarray:
            with np.errstate(all="ignore"):  # a scale of Inf or NaN: reading the factor reports its values
                return gguf.quants.dequantize(data, kind).reshape(shape)

    return Factor(shape, dtype, read, f"{label}: tensor {tensor.name}", allow_nonfinite, stored=kind.name)
