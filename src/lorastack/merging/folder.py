"""A Hugging Face folder as a new base: shards with changed tensors written anew, everything else carried along."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorastack.base.model import Part
from lorastack.base.opening import USUAL
from lorastack.files import CARD, below
from lorastack.formats.json_object import read_object
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.formats.shards import INDEX_ENDING
from lorastack.merging.card import RECIPE
from lorastack.merging.links import linked_to
from lorastack.merging.plan import Plan
from lorastack.merging.shard import Tensor, found_in, shards_of
from lorastack.merging.stream import How, Progress

#: Weights in another form than the one that is merged: they would be those of the old base.
_WEIGHTS = frozenset(".safetensors .bin .pt .pth .ckpt .msgpack .h5 .gguf .onnx .ot .tflite .npz".split())
#: What is written anew, and what would make of the folder an adapter on top of a base.
_NOT_CARRIED = frozenset({CARD, RECIPE, "adapter_config.json"})
_INDEX = USUAL[0] + INDEX_ENDING
#: How deep files lie in a base's folder.
_DEPTH = 4


class Folder:
    """What the new folder holds, and how to write it.

    ``left_out`` are the base's files that are not carried along.
    """

    def __init__(self, plan: Plan, how: How) -> None:
        self.plan, self.how = plan, how
        self.shards = shards_of(plan)
        self.where = self.shards[0].file.path.parent
        if plan.base.parts:  # each model of a pipeline has a folder in it
            self.where = self.where.parent
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
            target = out / shard.file.path.relative_to(self.where)
            target.parent.mkdir(parents=True, exist_ok=True)
            if shard.same and link and linked_to(shard.file.path, target):
                linked += 1
                progress(shard.size)
                continue
            shard.write(target, self.how, progress)
        return linked

    def find(self, out: Path, name: str) -> Part:
        """A tensor of the folder that was written."""
        shard = next(shard for shard in self.shards if any(tensor.name == name for tensor in shard.tensors))
        return found_in(shard, SafetensorsFile(out / shard.file.path.relative_to(self.where)), name)

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
        if any(not shard.in_place for shard in self.shards) and (self.where / _INDEX).is_file():
            changed[_INDEX] = self._index(read_object(self.where / _INDEX))
        return changed

    def _index(self, said: Mapping[str, Any]) -> str:
        tensors = [(tensor, shard.file.path.name) for shard in self.shards for tensor in shard.tensors]
        metadata = dict(said.get("metadata") or {})
        metadata["total_size"] = sum(tensor.size for tensor, _ in tensors)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(tensor.shape) for tensor, _ in tensors)
        weight_map = {tensor.name: name for tensor, name in sorted(tensors, key=lambda one: one[0].name)}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _others(folder: Path, shards: set[Path]) -> tuple[list[Path], list[Path]]:
    """The files that are carried along, and those that are left out: other forms of the weights."""
    carried: list[Path] = []
    left_out: list[Path] = []
    folders = {folder, *(path.parent for path in shards)}
    indices = {f"{usual}{INDEX_ENDING}" for usual in USUAL}
    for path in sorted(below(folder, _DEPTH)):
        inner = path.relative_to(folder)
        if path in shards or path.name in _NOT_CARRIED or any(part.startswith(".") for part in inner.parts[:-1]):
            continue
        stem = path.name.removesuffix(".index.json")
        is_weights = Path(stem).suffix in _WEIGHTS
        # A model of a pipeline that is in another form only is carried along as it is.
        other = is_weights and path.name not in indices and (path.parent in folders or len(folders) == 1)
        (left_out if other else carried).append(path)
    return carried, left_out
