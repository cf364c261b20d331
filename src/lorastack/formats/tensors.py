"""Tensors: what every file of weights offers, whichever way it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lorastack.core.factor import Factor
from lorastack.formats.heads import is_pickled, read_head
from lorastack.formats.opened import OpenedFile
from lorastack.formats.safetensors_file import Info, SafetensorsFile
from lorastack.formats.torch_bin import TorchBin


class Tensors(Protocol):
    """``tensors`` (name -> dtype, shape, span) known at once; `factor` reads one lazily.

    ``path`` is for messages, ``files`` are all that is read, ``notes`` what was done to read them.
    """

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[OpenedFile, ...]: ...
    @property
    def tensors(self) -> Mapping[str, Info]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor: ...


class Renamed:
    """The tensors of a file under other names: ``stored`` maps each to the file's own."""

    def __init__(self, inner: Tensors, stored: Mapping[str, str], notes: tuple[str, ...]) -> None:
        self._inner, self.stored = inner, stored
        self.path, self.files, self.metadata = inner.path, inner.files, inner.metadata
        self.notes = (*inner.notes, *notes)
        self.tensors: dict[str, Info] = {name: inner.tensors[own] for name, own in stored.items()}

    def factor(self, name: str, allow_nonfinite: bool = False) -> Factor:
        return self._inner.factor(self.stored[name], allow_nonfinite)


def open_tensors(path: Path | OpenedFile) -> SafetensorsFile | TorchBin:
    """One file of weights: safetensors, or what torch.save wrote; where it ends as neither, its content decides."""
    file = OpenedFile.of(path)
    if file.path.suffix == ".safetensors":
        return SafetensorsFile(file)
    if file.path.suffix == ".bin" or is_pickled(read_head(file)):
        return TorchBin(file)
    return SafetensorsFile(file)
