"""Read GGUF adapters as llama.cpp defines them (src/llama-adapter.cpp); the ``gguf`` package dequantises."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Q

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import Kind, LoraDelta, misfit
from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.core.extras import are_tokens
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.gguf_header import MAX_ELEMENTS, PLAIN, Header, Tensor, read_header
from lorastack.formats.heads import is_gguf, read_head, unreadable
from lorastack.formats.opened import OpenedFile

_PLAIN = frozenset({Q.F32, Q.F16, Q.F64})
_READABLE = _PLAIN | frozenset(gguf.quants._type_traits)


def load(file: Path | OpenedFile, name: str | None = None, allow_nonfinite: bool = False) -> LoadedLora:
    """Open a GGUF adapter: the header is checked and read, the factors stay in the file."""
    header = open_reader(file)
    assert isinstance(header.source, OpenedFile)
    return _adapter(header, header.source, name, allow_nonfinite)


def open_reader(path: Path | OpenedFile, max_elements: int | None = None) -> Header:
    """The checked header of a file, with ``fields`` and ``tensors`` as ``gguf.GGUFReader`` has them.

    Nothing is mapped: a tensor's ``data`` is read when asked for, from the same open of the file.
    """
    file = OpenedFile.of(path)
    return _read(file) if max_elements is None else _read(file, max_elements)


def _read(file: OpenedFile, max_elements: int = MAX_ELEMENTS) -> Header:
    if not is_gguf(read_head(file)):
        raise unreadable(file, "GGUF", "no GGUF file: it does not begin with that word; fetch it again")
    if file.size < 24:
        raise FormatError(f"{file}: {file.size} bytes are too few for a GGUF file; it is cut short")
    return read_header(file, str(file), max_elements)


class _Copied:
    """The bytes behind a ``gguf.GGUFReader``, with the face of an open file: its map is left once they are kept."""

    def __init__(self, data: np.ndarray) -> None:
        filename = getattr(data, "filename", None)
        self.path = Path(filename) if filename else Path()
        self._bytes = np.asarray(data).reshape(-1).view(np.uint8)
        self.size = self._bytes.size

    def read(self, start: int, size: int) -> bytes:
        return self._bytes[start : start + size].tobytes()

    def array(self, start: int, size: int) -> np.ndarray:
        return self._bytes[start : start + size]

    def sha256(self) -> str:
        return hashlib.sha256(self._bytes.data).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        digest = self.sha256()
        return {**self.__dict__, "sha256": partial(str, digest), "_bytes": self._bytes[:0]}

    def keep(self) -> None:
        self._bytes = self._bytes.copy()


def from_reader(reader: gguf.GGUFReader, name: str | None = None, allow_nonfinite: bool = False) -> LoadedLora:
    """The adapter in an open reader, whose numbers are copied; see `LoadedLora.from_gguf`."""
    source = _Copied(reader.data)
    header = read_header(source, str(source.path) if source.path.name else "GGUF data")
    lora = _adapter(header, source, name, allow_nonfinite)
    source.keep()  # a mapped file could be written to, or cut short, under what is computed with it
    return lora


def _adapter(header: Header, source: OpenedFile | _Copied, name: str | None, allow_nonfinite: bool) -> LoadedLora:
    path = source.path if source.path.name else None
    name = name or (path.stem if path else "lora")
    label = str(path or name)
    problems = Problems(f"cannot load {label}")
    metadata = {key: field.value for key, field in header.fields.items()}
    _check_identity(metadata, problems)
    if metadata.get("general.type") != "adapter":
        problems.raise_any(FormatError)  # a list of a whole model's tensors would bury the one thing to say
    alpha = _alpha(header, metadata, problems)
    tokens = _invocation_tokens(metadata, problems)
    pairs, norms = _pair(header, label, allow_nonfinite, problems)
    if not pairs and not problems:
        problems.add("it has no lora_a/lora_b tensors, so it would change nothing; convert the adapter again")
    problems.raise_any(FormatError)

    def build(weight: str, pair: tuple[Tensor, Tensor]) -> LoraDelta:
        a, b = (_factor(tensor, label, allow_nonfinite) for tensor in pair)
        kind = _kind(weight, a.shape)
        if kind == "embedding":
            # Stored (vocabulary, rank), since llama.cpp looks rows up; kept (rank, vocabulary) here.
            a = a.mapped(np.transpose, (a.shape[1], a.shape[0]))
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
        opened=(source,) if path else (),
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


def _alpha(header: Header, metadata: dict[str, Any], problems: Problems) -> float | None:
    """The file's alpha; None when it has none or 0."""
    value = metadata.get("adapter.lora.alpha")
    if value is not None:
        kind = header.fields["adapter.lora.alpha"].types[0]
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
    if not are_tokens(value):
        problems.add(f"key {key}: found {shown(value)}, expected a list of token ids; convert the adapter again")
        return ()
    return tuple(value)


def _pair(
    header: Header, label: str, allow_nonfinite: bool, problems: Problems
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Factor]]:
    """Match every lora_a with its lora_b; returns the pairs by weight, and the norms."""
    halves: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, Factor] = {}
    refused: set[str] = set()
    for tensor in header.tensors:
        weight, _, part = tensor.name.rpartition(".")
        before = len(problems.lines)
        if tensor.tensor_type not in _READABLE:
            problems.add(f"tensor {tensor.name}: found type {tensor.tensor_type.name}, expected floats or quants")
        elif header.swapped and tensor.tensor_type not in _PLAIN:
            # gguf's own writer leaves packed types as they are, its gguf_convert_endian.py swaps them.
            problems.add(
                f"tensor {tensor.name}: {tensor.tensor_type.name} in a file of the other byte order, where only "
                "F32, F16 and F64 are read; write it in this machine's"
            )
        elif part in ("lora_a", "lora_b") and weight.endswith(".weight") and weight != "rope_freqs.weight":
            halves.setdefault(weight, {})[part] = tensor
        elif tensor.name.endswith("_norm.weight"):
            norms[tensor.name] = _factor(tensor, label, allow_nonfinite)
        else:
            problems.add(f"tensor {tensor.name}: expected NAME.weight.lora_a or NAME.weight.lora_b; remove it")
        if len(problems.lines) > before:
            refused.add(weight)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, found in halves.items():
        if len(found) == 1:
            (has,) = found
            lacks = "lora_b" if has == "lora_a" else "lora_a"
            if weight not in refused:
                problems.add(f"tensor {weight}.{has} has no {weight}.{lacks}; convert the adapter again")
            continue
        a, b = found["lora_a"], found["lora_b"]
        shape_a, shape_b = a.dims[::-1], b.dims[::-1]
        kind = _kind(weight, shape_a)
        problem = misfit(shape_a[::-1] if kind == "embedding" else shape_a, shape_b, kind)
        if problem:
            problems.add(f"weight {weight}: {problem}; the file is damaged or of another base")
        pairs[weight] = (a, b)
    return pairs, norms


def _kind(weight: str, a: tuple[int, ...]) -> Kind:
    if weight == "token_embd.weight":
        return "embedding"
    return "experts" if len(a) == 3 else "linear"


def _factor(tensor: Tensor, label: str, allow_nonfinite: bool) -> Factor:
    shape, kind = tensor.dims[::-1], tensor.tensor_type
    if kind in _PLAIN:
        dtype = np.dtype(PLAIN[kind.name])
    elif kind == Q.BF16:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(np.float32)
    read = partial(_numbers, tensor, shape, dtype)
    return Factor(shape, dtype, read, f"{label}: tensor {tensor.name}", allow_nonfinite, stored=kind.name)


def _numbers(tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The numbers of a tensor in ``dtype``, which holds its own type without loss."""
    data = tensor.data
    if tensor.tensor_type in _PLAIN:
        return data.astype(dtype, copy=False)
    if tensor.tensor_type == Q.BF16:
        return data.view(dtype).reshape(shape)
    with np.errstate(all="ignore"):  # a scale of Inf or NaN: reading the factor reports its values
        return gguf.quants.dequantize(data, tensor.tensor_type).reshape(shape)
