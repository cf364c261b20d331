"""A single safetensors file as a new base: its header and its metadata stay, only numbers change."""

from __future__ import annotations

from pathlib import Path

from lorastack.base.model import Part
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.merging.plan import Plan
from lorastack.merging.shard import Tensor, found_in, shards_of
from lorastack.merging.stream import How, Progress


class OneFile:
    """What the new file holds, and how to write it."""

    def __init__(self, plan: Plan, how: How) -> None:
        self.how, self.as_folder = how, False
        (self.shard,) = shards_of(plan)
        self.left_out: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return self.shard.size

    @property
    def linkable(self) -> int:
        """Nothing: there is no file beside the one that changes."""
        return 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has, the base's own among them."""
        return list(self.shard.tensors)

    @property
    def sources(self) -> list[Path]:
        """The file of the base."""
        return [self.shard.file.path]

    def write(self, out: Path, recipe: str, link: bool, progress: Progress) -> int:
        """Write the file ``out``; none is a hard link. The recipe has no place in a header that stays as it is."""
        self.shard.write(out, self.how, progress)
        return 0

    def find(self, out: Path, name: str) -> Part:
        """A tensor of the file that was written."""
        return found_in(self.shard, SafetensorsFile(out), name)
