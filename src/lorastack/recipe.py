"""Recipes: TOML files that say which adapters, at which scales, changed how; and loading what they name."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorastack import formats
from lorastack.base import BaseModel, convert_names, open_base
from lorastack.core.adapter import LoadedLora
from lorastack.core.patterns import Matcher, PatternError
from lorastack.core.stack import LoraStack
from lorastack.core.target import Naming
from lorastack.errors import ArgumentError, LoraStackError, Problems
from lorastack.formats.provenance import Ingredient, Provenance, hashes
from lorastack.mixture import parse_entry
from lorastack.ways import BASE, MIXED, ways

_ADAPTER_KEYS = {"source", "scale", "name", "select", "scales", "steps", "sha256"}
_STEPS = {"select", "scales", "names", "rename", "without_extras"}


@dataclass(frozen=True)
class Recipe(Provenance):
    """A provenance that can be read from a TOML file and made again."""

    @classmethod
    def of_words(cls, words: Iterable[str], base: str | None = None) -> Recipe:
        """From ``FILE:SCALE`` words; a ``.toml`` file among them brings its own ingredients, times its scale.

        A ``base`` takes the place of those that recipes name.
        """
        return cls(tuple(Ingredient(*parse_entry(word)) for word in words))._unfolded(base=base)

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

    def _unfolded(self, within: tuple[Path, ...] = (), base: str | None = None) -> Recipe:
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
        bases = [base] if base else bases
        if len(set(bases)) > 1:
            named = ", ".join(dict.fromkeys(bases))
            raise ArgumentError(f"the recipes name different bases: {named}{ways(MIXED[0])}")
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

    def stack(
        self,
        *,
        base: BaseModel | str | None = None,
        naming: Naming | None = None,
        allow_nonfinite: bool = False,
        ignore: Collection[str] = (),
        drop_extras: bool = False,
        rename: Mapping[str, str] | None = None,
    ) -> LoraStack:
        """Load every ingredient and push it; one error lists all that fail.

        With a base, adapters of different naming are converted to ``naming`` (the first one's when not given).
        ``drop_extras`` leaves out what is not low-rank. ``rename`` replaces the front of weights' names, as
        `LoadedLora.with_weights_renamed` does, in every adapter that has such weights.
        """
        base = base if isinstance(base, BaseModel) or base is None else open_base(base)
        stack = LoraStack()
        problems = Problems("cannot load the stack")
        for lora, scale in self.entries(
            base=base, allow_nonfinite=allow_nonfinite, ignore=ignore, drop_extras=drop_extras, rename=rename
        ):
            try:
                to = naming or stack.naming
                if base is not None and to and to != lora.naming and "own" not in (to, lora.naming):
                    lora = convert_names(lora, base, to)
                stack.push(lora, scale)
            except LoraStackError as error:
                problems.add(error)
        problems.raise_any(ArgumentError)
        return stack

    def entries(
        self,
        *,
        base: BaseModel | None = None,
        allow_nonfinite: bool = False,
        ignore: Collection[str] = (),
        drop_extras: bool = False,
        rename: Mapping[str, str] | None = None,
    ) -> list[tuple[LoadedLora, float]]:
        """Load every ingredient, whatever its names; one error lists all that fail."""
        problems = Problems("cannot load the stack")
        loaded: list[tuple[LoadedLora, float]] = []
        for one in self.ingredients:
            try:
                lora = _load(one, allow_nonfinite, ignore, base)
                loaded.append((lora.without_extras() if drop_extras and lora.extras else lora, one.scale))
            except LoraStackError as error:
                problems.add(error)
        problems.raise_any(ArgumentError)
        return _renamed(loaded, rename or {})


def _renamed(loaded: list[tuple[LoadedLora, float]], rename: Mapping[str, str]) -> list[tuple[LoadedLora, float]]:
    """The adapters with the front of their weights' names replaced, each by what it has of ``rename``."""
    own = [{old: new for old, new in rename.items() if lora.has_front(old)} for lora, _ in loaded]
    if dead := [old for old in rename if not any(old in mine for mine in own)]:
        names = ", ".join(name for lora, _ in loaded for name in list(lora.adapters)[:2])
        raise ArgumentError(f"no weight's name begins with {', '.join(dead)}; weights are named like {names}")
    return [
        (lora.with_weights_renamed(mine) if mine else lora, scale)
        for (lora, scale), mine in zip(loaded, own, strict=True)
    ]


def _load(one: Ingredient, allow_nonfinite: bool, ignore: Collection[str], base: BaseModel | None) -> LoadedLora:
    """Load it, check its hashes, and change it as the recipe says."""
    lora = formats.load(one.source, name=one.name, allow_nonfinite=allow_nonfinite, ignore=ignore)
    if one.sha256 and dict(one.sha256) != (found := hashes(lora)):
        raise ArgumentError(f"{one.source} is not the file of the recipe: sha256 {found}, {dict(one.sha256)} wanted")
    for step, value in one.steps:
        if step == "select":
            names = list(lora.adapters)[:3]
            lora = lora.select(value)
            if not lora.adapters:
                raise ArgumentError(
                    f"{one.source}: no weight matches {value!r}; its weights are named like {', '.join(names)}"
                )
        elif step == "scales":
            lora = lora.scaled(value)
        elif step == "rename":
            lora = lora.with_weights_renamed(value)
        elif step == "without_extras":
            lora = lora.without_extras(*value)
        elif base is None:
            raise ArgumentError(f"{one.source}: names are converted to {value!r}, which needs the base{ways(BASE)}")
        else:
            lora = convert_names(lora, base, value)
    return lora


def load(
    path: str | Path,
    *,
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    subfolder: str | None = None,
    rename: Mapping[str, str] | None = None,
    base: BaseModel | str | None = None,
) -> LoadedLora:
    """Load an adapter file, as `lorastack.formats.load` does, or a recipe (``NAME.toml``) as the one adapter it makes.

    Parameters
    ----------
    base
        For a recipe: the base that its adapters' names are converted with, where it needs one and names none.
    name, allow_nonfinite, ignore, subfolder, rename
        As of `lorastack.formats.load`.

    Raises
    ------
    FormatError
        Listing everything that is wrong with the file.
    ArgumentError
        Listing everything that is wrong with the recipe.
    """
    given = os.fspath(path)
    if not given.endswith(".toml"):
        if base is not None:
            raise ArgumentError(f"{given}: base is for recipes; to convert names, use convert_names(lora, base)")
        options: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "ignore": ignore, "subfolder": subfolder}
        return formats.load(path, name=name, rename=rename, **options)
    recipe = Recipe.read(Path(given))
    said = base or recipe.base
    model = open_base(said) if isinstance(said, str) else said
    stack = recipe.stack(base=model, allow_nonfinite=allow_nonfinite, ignore=ignore, rename=rename)
    return stack.bake(model, name or Path(given).stem)


def load_stack(words: Iterable[str], **options: Any) -> LoraStack:
    """The stack of ``FILE:SCALE`` words and recipes; options as in `Recipe.stack`."""
    return Recipe.of_words(words).stack(**options)


def _located(source: str, folder: Path | None) -> str:
    if folder is not None and not Path(source).is_absolute() and (folder / source).exists():
        return str(folder / source)
    return source


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
    if step == "rename":
        return isinstance(value, dict) and all(isinstance(new, str) for new in value.values())
    if step == "names":
        return value in ("gguf", "hf")
    return step == "without_extras" and isinstance(value, list) and all(isinstance(kind, str) for kind in value)


def _good_pattern(pattern: str) -> bool:
    try:
        return bool(Matcher(pattern))
    except PatternError:
        return False


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # TOML's whole numbers may have any length
        return False
