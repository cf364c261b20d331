"""Recipes: which adapters, at which scales, changed how - as command-line words, as TOML, as metadata."""

from __future__ import annotations

import hashlib
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from lorastack.adapter import LoadedLora
from lorastack.base import BaseModel, convert_names, open_base
from lorastack.errors import ArgumentError, LoraStackError, Problems
from lorastack.formats import load
from lorastack.stack import LoraStack
from lorastack.target import Naming

_ADAPTER_KEYS = {"source", "scale", "name", "select", "scales", "steps", "sha256"}
_STEPS = {"select", "scales", "names", "without_extras"}


def parse_entry(word: str) -> tuple[str, float]:
    """Split ``FILE:SCALE``; the scale is 1 where there is none.

    A colon that belongs to the path stays there: a Windows drive, or a file that exists by that name.

    >>> parse_entry("zara:0.7"), parse_entry("zara"), parse_entry("C:/loras/zara.gguf")
    (('zara', 0.7), ('zara', 1.0), ('C:/loras/zara.gguf', 1.0))

    Raises
    ------
    ArgumentError
        When the scale is no finite number.
    """
    path, colon, tail = word.rpartition(":")
    if not colon or not path or Path(word).exists():
        return word, 1.0
    try:
        scale = float(tail)
    except ValueError:
        # C:\loras\zara.gguf and C:/loras/zara.gguf: the colon of a drive
        if len(path) == 1 and path.isalpha() and tail[:1] in ("\\", "/"):
            return word, 1.0
        raise ArgumentError(f"{word!r}: {tail!r} is no scale; write FILE:SCALE, as in {path}:0.7") from None
    if not math.isfinite(scale):
        raise ArgumentError(f"{word!r}: a scale is a finite number, got {tail}")
    return path, scale


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a recipe: where it is, its scale, what is changed after loading, what it must hash to."""

    source: str
    scale: float = 1.0
    name: str | None = None
    steps: tuple[tuple[str, Any], ...] = ()
    sha256: tuple[tuple[str, str], ...] = ()

    def load(self, allow_nonfinite: bool = False, ignore: Collection[str] = (), base: Any = None) -> LoadedLora:
        """Load it, check its hashes, and change it as the recipe says."""
        lora = load(self.source, name=self.name, allow_nonfinite=allow_nonfinite, ignore=ignore)
        if self.sha256 and dict(self.sha256) != (found := hashes(lora)):
            raise ArgumentError(
                f"{self.source} is not the file of the recipe: sha256 {found}, {dict(self.sha256)} wanted"
            )
        for step, value in self.steps:
            if step == "select":
                names = list(lora.adapters)[:3]
                lora = lora.select(value)
                if not lora.adapters:
                    raise ArgumentError(
                        f"{self.source}: no weight matches {value!r}; its weights are named like {', '.join(names)}"
                    )
            elif step == "scales":
                lora = lora.scaled(value)
            elif step == "without_extras":
                lora = lora.without_extras(*value)
            elif base is None:
                raise ArgumentError(f"{self.source}: names are converted to {value!r}, which needs the base (--base)")
            else:
                lora = convert_names(lora, base, value)
        return lora


@dataclass(frozen=True)
class Recipe:
    """The ingredients of a stack and, if known, its base."""

    ingredients: tuple[Ingredient, ...]
    base: str | None = None
    #: How they were baked, for the reader: a recipe is replayed as their sum, by the options given then.
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_words(cls, words: Iterable[str]) -> Recipe:
        """From ``FILE:SCALE`` words; a ``.toml`` file among them brings its own ingredients, times its scale."""
        return cls(tuple(Ingredient(*parse_entry(word)) for word in words))._unfolded()

    @classmethod
    def read(cls, path: Path, within: tuple[Path, ...] = ()) -> Recipe:
        """From a TOML file; paths in it are relative to its folder. ``within`` are the recipes that it is part of."""
        if path.resolve() in within:
            raise ArgumentError(f"{path}: the recipe is part of itself")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"{path}: the recipe cannot be read: {error}") from error
        return cls.parse(text, str(path), path.parent)._unfolded((*within, path.resolve()))

    @classmethod
    def parse(cls, text: str, label: str, folder: Path | None = None) -> Recipe:
        """From TOML text.

        Raises
        ------
        ArgumentError
            Listing everything that is wrong with it.
        """
        try:
            said = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ArgumentError(f"{label}: it is no TOML: {error}") from error
        problems = Problems(f"{label} is no recipe")
        tables = said.get("adapter")
        for key in sorted(set(said) - {"adapter", "base", "lorastack"}):
            problems.add(f"key {key!r} is not known; there are base and [[adapter]]")
        if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
            problems.add("it has no [[adapter]] with a source")
            tables = []
        ingredients = [one for n, t in enumerate(tables) if (one := _ingredient(n, t, folder, problems))]
        base = said.get("base")
        if base is not None and not isinstance(base, str):
            problems.add(f"base is {base!r}, expected a path or hub id")
        problems.raise_any(ArgumentError)
        return cls(tuple(ingredients), _located(base, folder) if base else None)

    @classmethod
    def of_lora(cls, lora: LoadedLora) -> Recipe:
        """What ``lora`` was made of, with the hashes of the files it came from."""
        parts = [
            (part, scale) for whole, scale in (lora.origin or ((lora, 1.0),)) for part, scale in _leaves(whole, scale)
        ]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(hashes, [part for part, _ in parts]))
        ingredients = [
            Ingredient(
                _source(part),
                scale,
                part.name,
                tuple((_STEP_NAMES.get(step, step), value) for step, value in part.history),
                tuple(sorted(sums.items())),
            )
            for (part, scale), sums in zip(parts, found, strict=True)
        ]
        # Made again, it needs a base only where names were converted; what an adapter says of its own may be anywhere.
        converted = [part for part, _ in parts if any(step == "names" for step, _ in part.history)]
        bases = {part.metadata.get("base_model_name_or_path") for part in converted} - {None}
        return cls(tuple(ingredients), bases.pop() if len(bases) == 1 else None, lora.made)

    def _unfolded(self, within: tuple[Path, ...] = ()) -> Recipe:
        """With the ingredients of every recipe among its own, times that one's scale."""
        ingredients: list[Ingredient] = []
        bases = [self.base] if self.base else []
        for one in self.ingredients:
            if not one.source.endswith(".toml"):
                ingredients.append(one)
                continue
            if one.name or one.sha256:
                raise ArgumentError(
                    f"{one.source}: it is a recipe, which has adapters and no name or sha256 of its own"
                )
            inner = Recipe.read(Path(one.source), within)
            bases += [inner.base] if inner.base else []
            ingredients += [
                replace(i, scale=i.scale * one.scale, steps=(*i.steps, *one.steps)) for i in inner.ingredients
            ]
        if len(set(bases)) > 1:
            raise ArgumentError(f"the recipes name different bases: {', '.join(dict.fromkeys(bases))}")
        return Recipe(tuple(ingredients), bases[0] if bases else None)

    def seen_from(self, folder: Path, also_absolute: bool = False) -> Recipe:
        """With paths relative to ``folder``: a file written there works from anywhere, and moves along with them.

        What is no path (a hub id) stays; so does a path said in full, unless ``also_absolute``.
        """

        def located(source: str) -> str:
            path = Path(source).expanduser()
            if not path.exists() or (Path(source).is_absolute() and not also_absolute):
                return source
            try:
                return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
            except ValueError:  # another drive
                return str(path.resolve())

        ingredients = tuple(replace(one, source=located(one.source)) for one in self.ingredients)
        return replace(self, ingredients=ingredients, base=located(self.base) if self.base else None)

    def to_toml(self) -> str:
        """The recipe as TOML, which `parse` reads."""
        said: dict[str, Any] = {"base": self.base} if self.base else {}
        said["adapter"] = [_table(one) for one in self.ingredients]
        if self.made:
            said["lorastack"] = dict(self.made)
        return tomli_w.dumps(said)

    def stack(
        self,
        *,
        base: BaseModel | str | None = None,
        naming: Naming | None = None,
        allow_nonfinite: bool = False,
        ignore: Collection[str] = (),
        drop_extras: bool = False,
    ) -> LoraStack:
        """Load every ingredient and push it; one error lists all that fail.

        With a base, adapters of different naming are converted to ``naming`` (the first one's when not given).
        ``drop_extras`` leaves out what is not low-rank.
        """
        base = base if isinstance(base, BaseModel) or base is None else open_base(base)
        stack = LoraStack()
        problems = Problems("cannot load the stack")
        for lora, scale in self.entries(base=base, allow_nonfinite=allow_nonfinite, ignore=ignore):
            try:
                if drop_extras and lora.extras:
                    lora = lora.without_extras()
                to = naming or stack.naming
                if base is not None and to and to != lora.naming and "own" not in (to, lora.naming):
                    lora = convert_names(lora, base, to)
                stack.push(lora, scale)
            except LoraStackError as error:
                problems.add(error)
        problems.raise_any(ArgumentError)
        return stack

    def entries(
        self, *, base: BaseModel | None = None, allow_nonfinite: bool = False, ignore: Collection[str] = ()
    ) -> list[tuple[LoadedLora, float]]:
        """Load every ingredient, whatever its names; one error lists all that fail."""
        problems = Problems("cannot load the stack")
        loaded: list[tuple[LoadedLora, float]] = []
        for one in self.ingredients:
            try:
                loaded.append((one.load(allow_nonfinite, ignore, base), one.scale))
            except LoraStackError as error:
                problems.add(error)
        problems.raise_any(ArgumentError)
        return loaded


def load_stack(words: Iterable[str], **options: Any) -> LoraStack:
    """The stack of ``FILE:SCALE`` words and recipes; options as in `Recipe.stack`."""
    return Recipe.of_words(words).stack(**options)


def hashes(lora: LoadedLora) -> dict[str, str]:
    """File name -> sha256 of every file the adapter was loaded from."""
    if lora.source is None:
        return {}
    files = _files(lora.source)
    return {file.name: _sha256(file) for file in files}


def _files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    yield from (file for name in names if (file := source / name).is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(lora: LoadedLora) -> str:
    """Where it came from, as `load` takes it: a path, or a hub id with its revision instead of a place in the cache."""
    if lora.source is None:
        return f"(in memory) {lora.name}"
    match = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)(/.+)?$", lora.source.as_posix())
    return f"{match[1]}/{match[2]}{match[4] or ''}@{match[3]}" if match else str(lora.source)


_STEP_NAMES = {"scaled": "scales"}


def _leaves(lora: LoadedLora, scale: float) -> Iterator[tuple[LoadedLora, float]]:
    """The files behind a baked adapter that was itself stacked again."""
    if not lora.origin or lora.history or lora.made:
        yield lora, scale
        return
    for part, own in lora.origin:
        yield from _leaves(part, own * scale)


def _located(source: str, folder: Path | None) -> str:
    if folder is not None and not Path(source).is_absolute() and (folder / source).exists():
        return str(folder / source)
    return source


def _table(one: Ingredient) -> dict[str, Any]:
    table: dict[str, Any] = {"source": one.source, "scale": one.scale}
    if one.name:
        table["name"] = one.name
    if one.steps:
        table["steps"] = [{step: value} for step, value in one.steps]
    if one.sha256:
        table["sha256"] = dict(one.sha256)
    return table


def _ingredient(n: int, table: dict[str, Any], folder: Path | None, problems: Problems) -> Ingredient | None:
    where = f"adapter {n + 1}"
    before = len(problems.lines)
    for key in sorted(set(table) - _ADAPTER_KEYS):
        problems.add(f"{where}: key {key!r} is not known; there are {', '.join(sorted(_ADAPTER_KEYS))}")
    source, scale, name = table.get("source"), table.get("scale", 1.0), table.get("name")
    if not isinstance(source, str) or not source:
        problems.add(f"{where}: source is {source!r}, expected a path or hub id")
    if not _finite(scale):
        problems.add(f"{where}: scale is {scale!r}, expected a finite number")
    if name is not None and not isinstance(name, str):
        problems.add(f"{where}: name is {name!r}, expected text")
    steps: list[tuple[str, Any]] = [(key, table[key]) for key in ("select", "scales") if key in table]
    said = table.get("steps", [])
    for step in said if isinstance(said, list) else [said]:
        steps += list(step.items()) if isinstance(step, dict) else [(str(step), None)]
    for step, value in steps:
        if not _good_step(step, value):
            problems.add(f"{where}: step {step} = {value!r} has no meaning; there are {', '.join(sorted(_STEPS))}")
    sums = table.get("sha256", {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        problems.add(f"{where}: sha256 is {sums!r}, expected file names with hashes")
    if len(problems.lines) > before:
        return None
    return Ingredient(_located(str(source), folder), float(scale), name, tuple(steps), tuple(sorted(sums.items())))


def _good_step(step: str, value: Any) -> bool:
    if step == "scales":
        return isinstance(value, dict) and all(_finite(f) and _good_pattern(p) for p, f in value.items())
    if step == "select":
        return isinstance(value, str) and _good_pattern(value)
    if step == "names":
        return value in ("gguf", "hf")
    return step == "without_extras" and isinstance(value, list) and all(isinstance(kind, str) for kind in value)


def _good_pattern(pattern: str) -> bool:
    try:
        return not pattern.startswith("re:") or bool(re.compile(pattern[3:]))
    except re.error:
        return False


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # TOML's whole numbers may have any length
        return False
