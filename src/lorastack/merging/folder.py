"""A Hugging Face folder as a new base: shards with changed tensors written anew, everything else carried along."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lorastack.base.model import Part
from lorastack.base.opening import INDEX
from lorastack.base.rows import Rows
from lorastack.files import below
from lorastack.files.large import LargeFile
from lorastack.formats.json_object import read_object
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.merging.card import CARD, RECIPE
from lorastack.merging.links import linked_to
from lorastack.merging.plan import Plan
from lorastack.merging.stream import How, Progress, contents, spans
from lorastack.merging.update import Update
from lorastack.pipeline import ahead

#: Weights in another form than the one that is merged: they would be those of the old base.
_WEIGHTS = frozenset(".safetensors .bin .pt .pth .ckpt .msgpack .h5 .gguf .onnx .ot .tflite .npz".split())
#: What is written anew, and what would make of the folder an adapter on top of a base.
_NOT_CARRIED = frozenset({CARD, RECIPE, "adapter_config.json"})
#: How deep files lie in a base's folder.
_DEPTH = 4


class Tensor(NamedTuple):
    """One tensor of a new shard: a changed one, or the base's own where there is no update."""

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


class Folder:
    """What the new folder holds, and how to write it.

    ``left_out`` are the base's files that are not carried along.
    """

    def __init__(self, plan: Plan, how: How) -> None:
        self.plan, self.how = plan, how
        files = dict.fromkeys(p.file for place in plan.base.stored.values() for p in place.parts)
        self.shards = [_shard(file, plan) for file in files if isinstance(file, SafetensorsFile)]
        self.where = self.shards[0].file.path.parent
        self.as_folder = True
        self.carried, self.left_out = _others(self.where, {shard.file.path for shard in self.shards})

    @property
    def size(self) -> int:
        """Bytes that are written when nothing is linked."""
        return sum(shard.size for shard in self.shards) + sum(path.stat().st_size for path in self.carried)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has, the base's own among them."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def sources(self) -> list[Path]:
        """The folder of the base."""
        return [self.where]

    @property
    def linkable(self) -> int:
        """Bytes of the files that hard links can stand for."""
        return sum(shard.size for shard in self.shards if shard.same)

    def write(self, out: Path, recipe: str, link: bool, progress: Progress) -> int:
        """Fill the new folder ``out``; returns how many files are hard links."""
        changed = self._config()
        linked = 0
        for path in self.carried:
            target = out / path.relative_to(self.where)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name in changed and path.parent == self.where:
                target.write_text(changed[path.name], encoding="utf-8")
            else:
                shutil.copyfile(path, target)
            progress(path.stat().st_size)
        for shard in self.shards:
            target = out / shard.file.path.name
            if shard.same and link and linked_to(shard.file.path, target):
                linked += 1
                progress(shard.size)
                continue
            source = shard.file.files[0]
            with LargeFile(target) as file:
                if not shard.same:
                    file.write(source.read(0, shard.file.data_start) if shard.in_place else _header(shard))
                for data in ahead(spans(source, 0, source.size)) if shard.same else contents(shard.tensors, self.how):
                    file.write(data)
                    progress(data.nbytes)
        return linked

    def find(self, out: Path, name: str) -> Part:
        """A tensor of the folder that was written."""
        shard = next(shard for shard in self.shards if any(tensor.name == name for tensor in shard.tensors))
        return Part(SafetensorsFile(out / shard.file.path.name), name)

    def _config(self) -> dict[str, str]:
        """The files of the folder whose text follows what changed."""
        plan, changed = self.plan, dict[str, str]()
        config = json.loads(json.dumps(plan.base.config)) | dict(plan.fields)
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
        if plan.untied:
            config["tie_word_embeddings"] = False
            if "tie_word_embeddings" in text:
                text["tie_word_embeddings"] = False
        if plan.vocabulary is not None:
            for said in (config, text):
                if "vocab_size" in said:
                    said["vocab_size"] = plan.vocabulary
        if config != plan.base.config:
            changed["config.json"] = json.dumps(config, indent=2) + "\n"
        if any(not shard.in_place for shard in self.shards) and (self.where / INDEX).is_file():
            changed[INDEX] = self._index(read_object(self.where / INDEX))
        return changed

    def _index(self, said: Mapping[str, Any]) -> str:
        tensors = [(tensor, shard.file.path.name) for shard in self.shards for tensor in shard.tensors]
        metadata = dict(said.get("metadata") or {})
        metadata["total_size"] = sum(tensor.size for tensor, _ in tensors)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(tensor.shape) for tensor, _ in tensors)
        weight_map = {tensor.name: name for tensor, name in sorted(tensors, key=lambda one: one[0].name)}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _shard(file: SafetensorsFile, plan: Plan) -> Shard:
    tensors: list[Tensor] = []
    for name, (kind, shape, start, stop) in sorted(file.tensors.items(), key=lambda one: one[1][2]):
        part = Part(file, name)
        update = plan.updates.get(part)
        new = _new_shape(shape, update)
        size = stop - start if new == shape else (stop - start) // math.prod(shape) * math.prod(new)
        tensors.append(Tensor(name, kind, new, part, update, size))
    in_place = all(tensor.shape == file.tensors[tensor.name][1] for tensor in tensors)
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


def _new_shape(shape: tuple[int, ...], update: Update | None) -> tuple[int, ...]:
    return shape if update is None or update.replaced is None else update.replaced.shape


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


def _others(folder: Path, shards: set[Path]) -> tuple[list[Path], list[Path]]:
    """The files that are carried along, and those that are left out: other forms of the weights."""
    carried: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(below(folder, _DEPTH)):
        inner = path.relative_to(folder)
        if path in shards or path.name in _NOT_CARRIED or any(part.startswith(".") for part in inner.parts[:-1]):
            continue
        stem = path.name.removesuffix(".index.json")
        is_weights = Path(stem).suffix in _WEIGHTS
        (left_out if is_weights and inner.name != INDEX else carried).append(path)
    return carried, left_out
