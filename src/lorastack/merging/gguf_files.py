"""GGUF files as a new base: changed tensors packed in their own types again, all other bytes as they are."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from lorastack.base.model import Part
from lorastack.base.rows import Rows, block_of
from lorastack.errors import ArgumentError, Problems, UnsupportedError
from lorastack.files.large import LargeFile
from lorastack.formats import MAX_VOCABULARY
from lorastack.formats.gguf import open_reader
from lorastack.formats.gguf_header import Header
from lorastack.formats.gguf_splits import SPLIT_KEYS, split_name, split_stem
from lorastack.formats.opened import OpenedFile
from lorastack.formats.peft import RECIPE_KEY
from lorastack.merging.links import linked_to
from lorastack.merging.packing import needs_importance, packable, packable_types
from lorastack.merging.plan import Plan
from lorastack.merging.stream import How, Progress, contents
from lorastack.merging.update import Update
from lorastack.ways import Way, argument, ways

FILE_TYPE = "general.file_type"
_OTHER = Way("choose another type with outtype='q8_0'", "choose another type with --outtype q8_0")
_MATRIX = Way("give an importance matrix as imatrix=...", "give an importance matrix with --imatrix")


class Tensor(NamedTuple):
    """One tensor of a new file: a changed one, or the base's own where there is no update."""

    name: str
    kind: str
    dims: tuple[int, ...]
    part: Part
    update: Update | None

    @property
    def size(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.dims) // block * size


class File(NamedTuple):
    """One new file: the base's files whose tensors it has, all or one; the first one's keys are its own."""

    name: str
    sources: Sequence[Header]
    tensors: Sequence[Tensor]

    @property
    def alignment(self) -> int:
        return self.sources[0].alignment


class GgufFiles:
    """What the new GGUF base holds, and how to write it: one file, or in a folder as many as the base has.

    Raises
    ------
    UnsupportedError
        Listing every tensor whose type cannot be written here.
    """

    def __init__(self, plan: Plan, how: How, out: Path) -> None:
        self.plan, self.how, self.as_folder = plan, how, out.suffix != ".gguf"
        self.left_out: tuple[Path, ...] = ()
        headers = list(dict.fromkeys(p.file for place in plan.base.stored.values() for p in place.parts))
        self.headers = [header for header in headers if isinstance(header, Header)]
        tensors = {id(header): _tensors(header, plan, how) for header in self.headers}
        _check([one for each in tensors.values() for one in each], how)
        stem, count = split_stem(self.headers[0].path.name), len(self.headers)
        if not self.as_folder:
            every = [tensor for header in self.headers for tensor in tensors[id(header)]]
            self.files = [File(out.name, self.headers, every)]
        else:
            self.files = [
                File(split_name(stem, n, count) if count > 1 else f"{stem}.gguf", [header], tensors[id(header)])
                for n, header in enumerate(self.headers)
            ]
        self.file_type = _file_type([tensor for file in self.files for tensor in file.tensors])

    @property
    def size(self) -> int:
        """Bytes that are written, but for some of the headers."""
        return sum(
            file.sources[0].tensors[0].start + sum(_padded(tensor.size, file.alignment) for tensor in file.tensors)
            for file in self.files
            if file.sources[0].tensors
        )

    @property
    def linkable(self) -> int:
        """Bytes of the files that hard links can stand for: never the first one, which has the recipe."""
        return sum(file.sources[0].path.stat().st_size for n, file in enumerate(self.files) if self._same(n))

    def _same(self, n: int) -> bool:
        return n > 0 and not self.plan.added and all(tensor.update is None for tensor in self.files[n].tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has, the base's own among them."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def sources(self) -> list[Path]:
        """The files of the base."""
        return [header.path for header in self.headers]

    def find(self, out: Path, name: str) -> Part:
        """A tensor of the files that were written."""
        file = next(file for file in self.files if any(tensor.name == name for tensor in file.tensors))
        path = out / file.name if self.as_folder else out
        return Part(open_reader(path, max_elements=MAX_VOCABULARY), name)

    def write(self, out: Path, recipe: str, link: bool, progress: Progress) -> int:
        """Write the file, or fill the folder, ``out``; returns how many files are hard links."""
        linked = 0
        for n, file in enumerate(self.files):
            path = out / file.name if self.as_folder else out
            if link and self._same(n) and linked_to(file.sources[0].path, path):
                linked += 1
                progress(path.stat().st_size)
                continue
            head = self._head(file, recipe if n == 0 else None)
            with LargeFile(path) as target:
                target.write(head + b"\0" * (-len(head) % file.alignment))
                for data in contents(file.tensors, self.how, file.alignment):
                    target.write(data)
                    progress(data.nbytes)
        return linked

    def _head(self, file: File, recipe: str | None) -> bytes:
        """Everything before the tensors: the base's keys as they are, but for those that follow what changed."""
        first = file.sources[0]
        new: dict[str, Any] = {RECIPE_KEY: recipe} if recipe else {}
        if FILE_TYPE in first.fields and self.file_type is not None:
            new[FILE_TYPE] = self.file_type
        dropped = {RECIPE_KEY, *new}
        if len(file.sources) > 1:
            dropped |= set(SPLIT_KEYS)
        elif len(self.headers) > 1:
            new[SPLIT_KEYS[2]] = len(self.tensors)
            dropped.add(SPLIT_KEYS[2])
        assert isinstance(first.source, OpenedFile)
        kept = [first.source.read(a, b - a) for key, (a, b) in first.spans.items() if key not in dropped]
        types = {key: first.fields[key].types[0] for key in new if key in first.fields}
        kept += [_key(key, value, types.get(key, GGUFValueType.STRING)) for key, value in new.items()]
        head = [b"GGUF", struct.pack("<IQQ", first.version, len(file.tensors), len(kept)), *kept]
        at = 0
        for tensor in file.tensors:
            name = tensor.name.encode()
            kind = int(GGMLQuantizationType[tensor.kind])
            count = len(tensor.dims)
            head.append(struct.pack(f"<Q{len(name)}sI{count}QIQ", len(name), name, count, *tensor.dims, kind, at))
            at += _padded(tensor.size, file.alignment)
        return b"".join(head)


def _tensors(header: Header, plan: Plan, how: How) -> list[Tensor]:
    """The tensors of one of the base's files, in the order of their data, and what is added to them."""
    found = []
    for own in sorted(header.tensors, key=lambda tensor: (tensor.start, tensor.size)):
        part = Part(header, own.name)
        update = plan.updates.get(part)
        found.append(Tensor(own.name, _kind(own.tensor_type.name, own.dims, update, how), own.dims, part, update))
    for name, like, update in plan.added:
        if like.file is header:
            own = header.by_name[like.key]
            kind = _kind(own.tensor_type.name, own.dims, update, how)
            found.append(Tensor(name, kind, own.dims, like, update))
    return found


def _kind(own: str, dims: tuple[int, ...], update: Update | None, how: How) -> str:
    """The type a tensor is written in: its own, or the one asked for where it is a matrix that changes."""
    return how.outtype.upper() if how.outtype and update is not None and len(dims) > 1 else own


def _check(tensors: Sequence[Tensor], how: How) -> None:
    if how.outtype and (how.outtype.upper() not in GGMLQuantizationType.__members__):
        raise ArgumentError(
            f"{argument('outtype')} {how.outtype!r} is no type of GGUF; there are {', '.join(packable_types())}"
        )
    problems = Problems("the tensors cannot be written")
    for tensor in tensors:
        if tensor.update is None:
            continue
        if why := packable(tensor.kind):
            problems.add(f"tensor {tensor.name}: {why}{ways(_OTHER, lead=', or ')}")
        elif tensor.dims[0] % (block := block_of(tensor.kind)):
            problems.add(
                f"tensor {tensor.name}: rows of {tensor.dims[0]} do not fill blocks of {block} ({tensor.kind})"
            )
        elif needs_importance(tensor.kind) and not _measured(tensor, how):
            what = "has no line in the importance matrix" if how.importance else "is packed by an importance matrix"
            problems.add(f"tensor {tensor.name}: its type {tensor.kind} {what}{ways(_MATRIX, _OTHER)}")
        elif how.importance and (size := _misfit(tensor, how)):
            problems.add(f"tensor {tensor.name}: the importance matrix has {size} values, expected {tensor.dims[0]}")
    problems.raise_any(UnsupportedError)


def _measured(tensor: Tensor, how: How) -> bool:
    return how.importance is not None and tensor.name in how.importance.values


def _misfit(tensor: Tensor, how: How) -> int:
    """How many values an importance matrix has where they are not as many as there are inputs; 0 where they are."""
    found = how.importance.values.get(tensor.name) if how.importance else None
    matrices = tensor.dims[2] if len(tensor.dims) > 2 else 1
    return 0 if found is None or found.size in (tensor.dims[0], tensor.dims[0] * matrices) else found.size


def _file_type(tensors: Sequence[Tensor]) -> int | None:
    """llama.cpp's number for what most of the weights are; None where it stays what the base says."""
    before = _mostly((Rows(tensor.part).kind, tensor.dims) for tensor in tensors)
    after = _mostly((tensor.kind, tensor.dims) for tensor in tensors)
    if before == after:
        return None
    table: Mapping[str, LlamaFileType] = LlamaFileType.__members__
    for name in (f"MOSTLY_{after}_M", f"MOSTLY_{after}", f"ALL_{after}"):
        if name in table:
            return int(table[name])
    return None


def _mostly(tensors: Any) -> str:
    counts: Counter[str] = Counter()
    for kind, dims in tensors:
        if len(dims) > 1:
            counts[kind] += math.prod(dims)
    return counts.most_common(1)[0][0] if counts else ""


def _key(key: str, value: Any, kind: GGUFValueType) -> bytes:
    """A key with its value, as the file has it."""
    name = key.encode()
    head = struct.pack(f"<Q{len(name)}sI", len(name), name, int(kind))
    if kind == GGUFValueType.STRING:
        text = str(value).encode()
        return head + struct.pack("<Q", len(text)) + text
    letters = {
        GGUFValueType.UINT32: "I",
        GGUFValueType.INT32: "i",
        GGUFValueType.UINT16: "H",
        GGUFValueType.UINT64: "Q",
    }
    return head + struct.pack("<" + letters.get(kind, "I"), value)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
