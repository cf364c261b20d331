"""Shard: one safetensors file of a new base: changed tensors written anew, everything else as the base has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from lorastack.base.model import Part
from lorastack.base.rows import Rows
from lorastack.files.large import LargeFile
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.merging.plan import Plan
from lorastack.merging.stream import How, Progress, contents, spans
from lorastack.merging.update import Update
from lorastack.pipeline import ahead


class Tensor(NamedTuple):
    """One tensor of a new shard, or some rows of it: a changed one, or the base's own where there is no update."""

    name: str
    kind: str
    shape: tuple[int, ...]
    part: Part
    update: Update | None
    size: int


@dataclass(frozen=True)
class Shard:
    """One file of weights; ``same`` says that nothing in it changes."""

    file: SafetensorsFile
    tensors: Sequence[Tensor]
    same: bool
    #: The header stays as it is.
    in_place: bool

    @property
    def size(self) -> int:
        return self.file.data_start + sum(tensor.size for tensor in self.tensors)

    def write(self, out: Path, how: How, progress: Progress) -> None:
        """The whole file, a block of rows at a time."""
        source = self.file.files[0]
        with LargeFile(out) as file:
            if not self.same:
                file.write(source.read(0, self.file.data_start) if self.in_place else _header(self))
            for data in ahead(spans(source, 0, source.size)) if self.same else contents(self.tensors, how):
                file.write(data)
                progress(data.nbytes)


def shards_of(plan: Plan) -> list[Shard]:
    """The files of the base, with what changes in each."""
    files = dict.fromkeys(p.file for place in plan.base.stored.values() for p in place.parts)
    spans: dict[tuple[int, str], list[Part]] = {}
    for part in plan.updates:
        if part.rows is not None:
            spans.setdefault((id(part.file), part.key), []).append(part)
    return [_shard(file, plan, spans) for file in files if isinstance(file, SafetensorsFile)]


def _shard(file: SafetensorsFile, plan: Plan, spans: dict[tuple[int, str], list[Part]]) -> Shard:
    tensors: list[Tensor] = []
    for name, (kind, shape, start, stop) in sorted(file.tensors.items(), key=lambda one: one[1][2]):
        if pieces := spans.get((id(file), name)):
            tensors += _pieces(file, name, pieces, plan)
            continue
        part = Part(file, name)
        update = plan.updates.get(part)
        new = _new_shape(shape, update)
        size = stop - start if new == shape else (stop - start) // math.prod(shape) * math.prod(new)
        tensors.append(Tensor(name, kind, new, part, update, size))
    in_place = all(tensor.part.rows is not None or tensor.shape == file.tensors[tensor.name][1] for tensor in tensors)
    for name, like, update in plan.added:
        if like.file is file:
            base = next(tensor for tensor in tensors if tensor.part == like)
            shape = _new_shape(file.tensors[like.key][1], update)
            rows = Rows(like)
            size = rows.size // math.prod(rows.shape) * math.prod(shape)
            tensors.append(Tensor(name, base.kind, shape, like, update, size))
            in_place = False
    same = in_place and all(tensor.update is None for tensor in tensors)
    return Shard(file, tensors, same, in_place)


def found_in(shard: Shard, written: SafetensorsFile, name: str) -> Part:
    """Where the tensor of that name lies in a file that was written."""
    part = next(tensor.part for tensor in shard.tensors if tensor.name == name)
    return Part(written, name if part.rows is None else part.key, part.rows)


def _pieces(file: SafetensorsFile, name: str, changed: Sequence[Part], plan: Plan) -> list[Tensor]:
    """A tensor of several weights: the rows that change, and those between them."""
    kind, shape, *_ = file.tensors[name]
    found, at = [], 0
    for first, stop in [*sorted(part.rows for part in changed if part.rows), (shape[0], shape[0])]:
        for begin, end in ((at, first), (first, stop)):
            if begin < end:
                part = Part(file, name, (begin, end))
                rows = Rows(part)
                label = f"{name}, rows {begin} to {end - 1}"
                found.append(Tensor(label, kind, rows.shape, part, plan.updates.get(part), rows.size))
        at = stop
    return found


def _new_shape(shape: tuple[int, ...], update: Update | None) -> tuple[int, ...]:
    """That of what is put in its place; the file's own where it only writes the same numbers in other dimensions."""
    if update is None or update.replaced is None or math.prod(update.replaced.shape) == math.prod(shape):
        return shape
    return update.replaced.shape


def _header(shard: Shard) -> bytes:
    """A header for tensors in this order, padded as the package pads it."""
    entries: dict[str, object] = {"__metadata__": shard.file.metadata} if shard.file.metadata else {}
    at = 0
    for tensor in shard.tensors:
        entries[tensor.name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    raw = orjson.dumps(entries)
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
