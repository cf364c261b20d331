"""Recipes: TOML files that say which adapters, at which scales, changed how; and loading what they name."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorastack import formats
from lorastack.base import BaseModel, convert_names, open_base
from lorastack.core.adapter import LoadedLora
from lorastack.core.stack import LoraStack
from lorastack.core.target import Naming
from lorastack.errors import ArgumentError, FormatError, LoraStackError, Problems, shown
from lorastack.files import below, local, nearest, present
from lorastack.formats.products import cut_products
from lorastack.formats.provenance import Ingredient, Provenance, hashes
from lorastack.mixture import parse_spec
from lorastack.recipe_text import KEYS, ingredient_of, located, read_text, values_of
from lorastack.ways import BASE, MIXED, ways

#: How deep recipes may lie within recipes, and what may come of them in all: two in each of thirty make a thousand
#: million adapters.
MAX_DEPTH, MAX_INGREDIENTS, MAX_STEPS = 16, 10_000, 100_000


@dataclass(frozen=True)
class Recipe(Provenance):
    """A provenance that can be read from a TOML file and made again."""

    #: The file that names the base, for messages.
    base_said_in: str | None = field(default=None, compare=False)

    @classmethod
    def of_words(cls, words: Iterable[str], base: str | None = None) -> Recipe:
        """From ``FILE:SCALE`` words; a ``.toml`` file among them brings its own ingredients, times its scale.

        A ``base`` takes the place of those that recipes name.
        """
        return _Unfolding().unfold(cls(tuple(Ingredient(*parse_spec(word)) for word in words)), base=base)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a TOML file; paths in it are relative to its folder."""
        return _Unfolding().read(path)

    @classmethod
    def parse(cls, text: str, label: str, folder: Path | None = None) -> Recipe:
        """From TOML text.

        Raises
        ------
        ArgumentError
            Listing everything that is wrong with it.
        """
        said = values_of(text, label)
        problems = Problems(f"{label} is no recipe")
        tables = said.get("adapter")
        for key in sorted(set(said) - KEYS):
            problems.add(f"key {shown(key)} is not known; there are base and [[adapter]]")
        if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
            problems.add("it has no [[adapter]] with a source")
            tables = []
        ingredients = [one for n, t in enumerate(tables) if (one := ingredient_of(n, t, folder, problems))]
        if folder is not None:
            ingredients = [replace(one, recipe=label) for one in ingredients]
        base = said.get("base")
        if base is not None and not isinstance(base, str):
            problems.add(f"base is {shown(base)}, expected a path or hub id")
        problems.raise_any(ArgumentError)
        said_in = label if base and folder is not None else None
        return cls(tuple(ingredients), located(base, folder) if base else None, base_said_in=said_in)

    def open_base(self) -> BaseModel | None:
        """The base it names, opened; None where it names none.

        Raises
        ------
        FormatError
            When it is not there, which says what file names it, and where it was looked for.
        """
        if self.base is None:
            return None
        try:
            return open_base(self.base)
        except FormatError as error:
            if self.base_said_in is None or present(local(self.base)):
                raise
            raise FormatError(_not_there("base", self.base, self.base_said_in, error)) from error

    @property
    def sources(self) -> list[str]:
        """What it is made of: adapters and the base, as they are named."""
        return [*(one.source for one in self.ingredients), *([self.base] if self.base else [])]

    def seen_from(self, folder: Path, also_absolute: bool = False) -> Recipe:
        """With paths relative to ``folder``: a file written there works from anywhere, and moves along with them.

        What is no path (a hub id) stays; so does a path said in full, unless ``also_absolute``.
        """

        def seen(source: str) -> str:
            path = local(source)
            if not present(path) or (Path(source).is_absolute() and not also_absolute):
                return source
            try:
                return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
            except ValueError:  # another drive
                return str(path.resolve())

        ingredients = tuple(replace(one, source=seen(one.source)) for one in self.ingredients)
        return replace(self, ingredients=ingredients, base=seen(self.base) if self.base else None)

    def stack(
        self,
        *,
        base: BaseModel | str | None = None,
        naming: Naming | None = None,
        allow_nonfinite: bool = False,
        ignore: Collection[str] = (),
        drop_extras: bool = False,
        rename: Mapping[str, str] | None = None,
        rank: int | None = None,
    ) -> LoraStack:
        """Load every ingredient and push it; one error lists all that fail.

        With a base, adapters of different naming are converted to ``naming`` (the first one's when not given).
        ``drop_extras`` leaves out what is not low-rank. ``rename`` replaces the front of weights' names, as
        `LoadedLora.with_weights_renamed` does, in every adapter that has such weights. ``rank`` is of `formats.load`.
        """
        base = base if isinstance(base, BaseModel) or base is None else open_base(base)
        stack = LoraStack()
        problems = Problems("cannot load the stack")
        for lora, scale in self.entries(
            base=base, allow_nonfinite=allow_nonfinite, ignore=ignore, drop_extras=drop_extras, rename=rename, rank=rank
        ):
            try:
                of_kohya = base is not None and base.naming == "hf" and lora.naming == "kohya"
                to = naming or stack.naming or ("hf" if of_kohya else None)
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
        rank: int | None = None,
    ) -> list[tuple[LoadedLora, float]]:
        """Load every ingredient, whatever its names; one error lists all that fail."""
        problems = Problems("cannot load the stack")
        loaded: list[tuple[LoadedLora, float]] = []
        for one in self.ingredients:
            try:
                lora = _load(one, allow_nonfinite, ignore, base)
                lora = lora if rank is None else cut_products(lora, rank)
                loaded.append((lora.without_extras() if drop_extras and lora.extras else lora, one.scale))
            except LoraStackError as error:
                problems.add(error)
        problems.raise_any(ArgumentError)
        return _renamed(loaded, rename or {})


class _Unfolding:
    """Recipes within recipes as one list of adapters: each file is read once, and what comes of it is counted."""

    def __init__(self) -> None:
        self._within: list[Path] = []
        self._read: dict[Path, tuple[Recipe, int]] = {}
        self._height = 0

    def read(self, path: Path) -> Recipe:
        """The recipe in this file."""
        place = _resolved(path)
        if place in self._within:
            raise ArgumentError(f"{path}: the recipe is part of itself")
        if place not in self._read:
            if len(self._within) >= MAX_DEPTH:
                raise ArgumentError(f"{path}: recipes are within each other more than {MAX_DEPTH} deep")
            self._within.append(place)
            recipe = self.unfold(Recipe.parse(read_text(path), str(path), path.parent))
            self._within.pop()
            self._read[place] = recipe, self._height
        recipe, self._height = self._read[place]
        return recipe

    def unfold(self, recipe: Recipe, base: str | None = None) -> Recipe:
        """With the ingredients of every recipe among its own, times that one's scale."""
        ingredients: list[Ingredient] = []
        bases = {recipe.base: recipe.base_said_in} if recipe.base else {}
        height = steps = 0
        for one in recipe.ingredients:
            if one.source.endswith(".toml"):
                if one.name or one.sha256:
                    raise ArgumentError(
                        f"{one.source}: it is a recipe, which has adapters and no name or sha256 of its own"
                    )
                inner = self.read(Path(one.source))
                height = max(height, self._height)
                bases |= {inner.base: inner.base_said_in} if inner.base else {}
                new = [_within(i, one) for i in inner.ingredients]
            else:
                new = _each_of(one)
            ingredients += new
            steps += sum(len(i.steps) for i in new)
            if len(ingredients) > MAX_INGREDIENTS or steps > MAX_STEPS:
                raise ArgumentError(
                    f"the recipes make more than {MAX_INGREDIENTS:,} adapters, or {MAX_STEPS:,} steps, in all"
                )
        self._height = height + 1
        if self._height > MAX_DEPTH + 1:
            raise ArgumentError(f"recipes are within each other more than {MAX_DEPTH} deep")
        bases = {base: None} if base else bases
        if len(bases) > 1:
            raise ArgumentError(f"the recipes name different bases: {', '.join(bases)}{ways(MIXED[0])}")
        said, said_in = next(iter(bases.items()), (None, None))
        return Recipe(tuple(ingredients), said, base_said_in=said_in)


def _each_of(one: Ingredient) -> list[Ingredient]:
    """A folder that holds several adapters stands for all of them, each at its scale."""
    inside = each_of(one.source)
    if len(inside) == 1:
        return [one]
    if one.name or one.sha256:
        what = "a name" if one.name else "a sha256"
        raise ArgumentError(
            f"{one.source}: {what} is for one adapter, and it holds {len(inside)}; name one of them",
            inside[:50],
        )
    return [replace(one, source=source) for source in inside]


def _within(one: Ingredient, outer: Ingredient) -> Ingredient:
    scale = one.scale * outer.scale
    if not math.isfinite(scale):
        raise ArgumentError(f"{outer.source}: {one.source} gets the scale {one.scale:g} * {outer.scale:g}, too large")
    return replace(one, scale=scale, steps=(*one.steps, *outer.steps))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a ring of links among them
        raise ArgumentError(f"{shown(str(path))}: the recipe cannot be read: {error}") from error


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
    try:
        lora = formats.load(one.source, name=one.name, allow_nonfinite=allow_nonfinite, ignore=ignore)
    except FormatError as error:
        if one.recipe is None or present(local(one.source)):
            raise
        raise FormatError(_not_there("source", one.source, one.recipe, error)) from error
    if one.sha256 and dict(one.sha256) != (found := hashes(lora)):
        raise ArgumentError(f"{one.source} is not the file of the recipe: sha256 {found}, {dict(one.sha256)} wanted")
    for step, value in one.steps:
        if step == "select":
            lora = lora.select(value)
        elif step == "scales":
            lora = lora.scaled(value)
        elif step == "rename":
            lora = lora.with_weights_renamed(value)
        elif step == "without_extras":
            lora = lora.without_extras(*value)
        elif step == "lokr_rank":
            lora = cut_products(lora, value)
        elif base is None:
            raise ArgumentError(
                f"{one.source}: names are converted to {shown(value)}, which needs the base{ways(BASE)}"
            )
        else:
            lora = convert_names(lora, base, value)
    return lora


def _not_there(what: str, said: str, recipe: str, error: FormatError) -> str:
    """What to say of a path that is not where a recipe has it: one of the two was moved."""
    folder, wanted = Path(recipe).parent, local(said)
    tried = os.path.abspath(folder / wanted)
    places = [place for path in below(folder, 4) for place in (path, path.parent) if place.name == wanted.name]
    near = f"; did you mean {places[0]}?" if places else nearest(folder / wanted)
    return f"recipe {recipe}: its {what} {error}; {tried} is not there either{near}"


def load(
    path: str | Path,
    *,
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    subfolder: str | None = None,
    rename: Mapping[str, str] | None = None,
    base: BaseModel | str | None = None,
    rank: int | None = None,
) -> LoadedLora:
    """Load an adapter file, as `lorastack.formats.load` does, or a recipe (``NAME.toml``) as the one adapter it makes.

    Parameters
    ----------
    base
        For a recipe: the base that its adapters' names are converted with, where it needs one and names none.
    name, allow_nonfinite, ignore, subfolder, rename, rank
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
        return formats.load(path, name=name, rename=rename, rank=rank, **options)
    recipe = Recipe.read(Path(given))
    model = recipe.open_base() if base is None else open_base(base) if isinstance(base, str) else base
    stack = recipe.stack(base=model, allow_nonfinite=allow_nonfinite, ignore=ignore, rename=rename, rank=rank)
    return stack.bake(model, name or Path(given).stem)


def load_stack(words: Iterable[str], **options: Any) -> LoraStack:
    """The stack of ``FILE:SCALE`` words and recipes; options as in `Recipe.stack`."""
    return Recipe.of_words(words).stack(**options)


def each_of(source: str) -> list[str]:
    """The adapters that a word without a scale names: itself, or all that a folder holds which is none itself."""
    return ([str(path) for path in formats.adapters_in(local(source))] if source else []) or [source]


def recipe_files(words: Iterable[str]) -> list[str]:
    """The recipes among ``FILE:SCALE`` words."""
    return [source for word in words if (source := parse_spec(word)[0]).endswith(".toml")]
