"""Library: the adapters and recipes of one folder, by name. It knows no engine and no cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lorastack.errors import ArgumentError, FormatError, LoraStackError, UnknownNameError, did_you_mean, shown
from lorastack.files import local, looked_into, status_of
from lorastack.formats import load
from lorastack.formats.opened import OpenedFile, version_of
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.provenance import Ingredient, hashes
from lorastack.mixture import NAME, Mixture
from lorastack.recipe import Recipe

#: Names that a message lists.
_LISTED = 50
_GGUF, _RECIPE = ".gguf", ".toml"


class _Seen(NamedTuple):
    """What an adapter hashed to, while its folder and its files were of these versions."""

    versions: Mapping[Path, tuple[int, ...] | None]
    sums: dict[str, str]


class Library:
    """The adapters in a folder: PEFT folders, GGUF files and recipes (``NAME.toml`` is a mixture with a name).

    Only what lies in the folder itself is listed, under names that `lorastack.mixture.NAME` allows; a link that leads
    out of the folder is no adapter, nor is a recipe's source outside of it. The folder may change at any time.

    Parameters
    ----------
    folder
        Where they lie.

    Raises
    ------
    ArgumentError
        When there is no such folder.

    Example
    -------
    >>> import tempfile, numpy as np
    >>> from lorastack import LoadedLora
    >>> folder = Path(tempfile.mkdtemp())
    >>> pair = np.ones((1, 4), np.float32), np.ones((3, 1), np.float32)
    >>> saved = LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}).save(folder / "zara")
    >>> Library(folder).names()
    ['zara']
    >>> Library(folder).recipe(Mixture.parse("zara:0.5")).ingredients[0].scale
    0.5
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local(os.fspath(folder)).absolute()
        found = status_of(self.folder, ArgumentError)
        if found is None or not self.folder.is_dir():
            raise ArgumentError(f"library {folder}: there is no such folder")
        looked_into(self.folder, ArgumentError)
        self._seen: dict[Path, _Seen] = {}

    def names(self) -> list[str]:
        """What can be asked for, sorted."""
        return sorted({name for name, _ in self._entries()})

    def path(self, name: str) -> Path:
        """The file or folder of an adapter or a recipe.

        Raises
        ------
        UnknownNameError
            When there is none of that name; it lists those there are.
        ArgumentError
            When there are several.
        """
        found = self._named(name)
        if not found:
            raise self._unknown(name)
        if len(found) > 1:
            there = " and ".join(path.name for path in found)
            raise ArgumentError(f"{name} is both {there} in {self.folder}; rename all but one")
        return found[0]

    def recipe(self, mixture: Mixture) -> Recipe:
        """The adapters of a mixture with the hashes of their files, recipes among them unfolded; no tensor is read.

        A file is hashed once in each of its versions.

        Raises
        ------
        UnknownNameError
            When the library lacks an adapter.
        FormatError, ArgumentError
            When one cannot be read, or a recipe has no meaning.
        """
        if missing := [name for name, _ in mixture if not self._named(name)]:
            raise self._unknown(*missing)
        ingredients: list[Ingredient] = []
        for name, scale in mixture:
            path = self.path(name)
            if path.suffix != _RECIPE:
                ingredients.append(Ingredient(str(path), scale, name))
                continue
            inner = Recipe.read(path).ingredients
            ingredients += [replace(one, scale=one.scale * scale) for one in inner]
        return Recipe(tuple(self._hashed(one) for one in ingredients))

    def _hashed(self, one: Ingredient) -> Ingredient:
        path = Path(one.source)
        if not path.is_absolute() or not self._inside(path):
            where = f"recipe {one.recipe}" if one.recipe else "the library"
            raise ArgumentError(f"{where}: its source {shown(one.source)} lies outside of {self.folder}")
        sums = tuple(sorted(self._sums(path).items()))
        if one.sha256 and one.sha256 != sums:
            raise ArgumentError(f"{one.source} is not the file of the recipe: sha256 {dict(sums)}")
        return replace(one, sha256=sums)

    def _sums(self, path: Path) -> dict[str, str]:
        """File name -> hash of what is read for an adapter; read again when a file of it, or its folder, changed."""
        seen = self._seen.get(path)
        if seen is None or any(_version(one) != version for one, version in seen.versions.items()):
            # Versions are looked at first: what changes in between is seen as a change the next time.
            before = _version(path)
            try:
                lora = load(path)
            except LoraStackError as error:  # a server may hide paths from who asks
                raise FormatError(f"adapter {path.stem if path.is_file() else path.name}: {error}") from error
            outside = [file for file in lora.files if not self._inside(file)]
            if outside:
                raise FormatError(f"{path}: {', '.join(file.name for file in outside)} leads out of {self.folder}")
            # Of the very open that is hashed: another file may lie there by now.
            versions = {path: before} | {one.path: one.version for one in lora.opened if isinstance(one, OpenedFile)}
            seen = self._seen[path] = _Seen(versions, dict(hashes(lora)))
        return seen.sums

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(self.folder)) in Path(os.path.realpath(path)).parents

    def _entries(self) -> Iterator[tuple[str, Path]]:
        with os.scandir(self.folder) as entries:
            paths = sorted(Path(entry.path) for entry in entries)
        for path in paths:
            for name in {path.name, path.stem}:
                if path in self._named(name):
                    yield name, path

    def _named(self, name: str) -> list[Path]:
        """The adapters and recipes of that name, without listing the folder, which may have thousands."""
        if not NAME.fullmatch(name):
            return []
        folder, files = self.folder / name, [self.folder / (name + ending) for ending in (_GGUF, _RECIPE)]
        found = [folder] if (folder / CONFIG_NAME).is_file() else []
        found += [path for path in files if path.is_file()]
        return [path for path in found if not path.is_symlink() or self._inside(path)]

    def _unknown(self, *names: str) -> UnknownNameError:
        there = self.names()
        listed = ", ".join(there[:_LISTED]) + (", ..." if len(there) > _LISTED else "")
        near = "".join(did_you_mean(name, there) for name in names)
        return UnknownNameError(
            f"no adapter named {', '.join(names)} in the library; there are {len(there)}: {listed or 'none'}{near}"
        )


def _version(path: Path) -> tuple[int, ...] | None:
    found = status_of(path)
    return None if found is None else version_of(found)
