"""Provenance: which files an adapter was made of, at which scales, changed how: the data that a file keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import tomli_w

from lorastack.core.adapter import LoadedLora
from lorastack.errors import FormatError, is_text, shown
from lorastack.hub import of_cache
from lorastack.ways import Way, ways

#: What stands in place of a path.
_IN_MEMORY = "(in memory) "


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a recipe: where it is, its scale, what is changed after loading, what it must hash to."""

    source: str
    scale: float = 1.0
    name: str | None = None
    steps: tuple[tuple[str, Any], ...] = ()
    sha256: tuple[tuple[str, str], ...] = ()
    #: The recipe that names it, for messages.
    recipe: str | None = field(default=None, compare=False)

    @property
    def in_memory(self) -> bool:
        """Whether it was in no file, so that nobody can load it again."""
        return self.source.startswith(_IN_MEMORY)


@dataclass(frozen=True)
class Provenance:
    """The ingredients of an adapter and, if known, its base."""

    ingredients: tuple[Ingredient, ...]
    base: str | None = None
    #: How they were baked, for the reader: it is replayed as their sum, by the options given then.
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_lora(cls, lora: LoadedLora) -> Self:
        """What ``lora`` was made of, with the hashes of the files it came from."""
        parts = parts_of(lora)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(hashes, [part for part, _ in parts]))
        ingredients = [
            replace(one, sha256=tuple(sorted(sums.items())))
            for one, sums in zip(ingredients_of(lora), found, strict=True)
        ]
        # Made again, it needs a base only where names were converted; what an adapter says of its own may be anywhere.
        converted = [part for part, _ in parts if any(step == "names" for step, _ in part.history)]
        named = (part.metadata.get("base_model_name_or_path") for part in converted)
        bases = {_utf8(base) for base in named if isinstance(base, str)}
        return cls(tuple(ingredients), bases.pop() if len(bases) == 1 else None, lora.made)

    def to_toml(self) -> str:
        """The recipe as TOML, which `parse` reads."""
        said: dict[str, Any] = {"base": self.base} if self.base else {}
        said["adapter"] = [_table(one) for one in self.ingredients]
        if self.made:
            said["lorastack"] = dict(self.made)
        text = tomli_w.dumps(said)
        if not is_text(text):
            names = ", ".join(shown(one.source) for one in self.ingredients)
            way = ways("rename what is not", Way("pass recipe=False", "pass --no-recipe"))
            raise FormatError(f"the recipe names {names}, but only texts that UTF-8 holds can be kept{way}")
        return text


def ingredients_of(lora: LoadedLora) -> list[Ingredient]:
    """What ``lora`` was made of, without the hashes, for which every file is read."""
    return [
        Ingredient(
            _utf8(_source(part)),
            scale,
            _utf8(part.name),
            tuple((_STEP_NAMES.get(step, step), value) for step, value in part.history),
        )
        for part, scale in parts_of(lora)
    ]


def parts_of(lora: LoadedLora) -> list[tuple[LoadedLora, float]]:
    """The adapters that ``lora`` was made of, with their scales; itself where it was made of none."""
    return [(part, scale) for whole, scale in (lora.origin or ((lora, 1.0),)) for part, scale in leaves(whole, scale)]


def sources_of(lora: LoadedLora) -> list[Path]:
    """Where it, and all that it was made of, was loaded from; its models too, those that are paths."""
    parts = [part for whole, _ in lora.origin or ((lora, 1.0),) for part, _ in leaves(whole, 1.0)]
    every = (lora, *parts)
    found = [source for one in every if (source := one.source)]
    said = [one.metadata.get("base_model_name_or_path") for one in every]
    said += [one.made.get(key) for one in every for key in ("finetuned", "base")]  # of one that was extracted
    return [*dict.fromkeys((*found, *(Path(model) for model in said if isinstance(model, str) and model)))]


def hashes(lora: LoadedLora) -> dict[str, str]:
    """File name -> sha256 of every file the adapter was loaded from, of the bytes that its numbers are read from.

    Raises
    ------
    FormatError
        When a file was changed since.
    """
    return {_utf8(file.path.name): file.sha256() for file in lora.opened}


def _source(lora: LoadedLora) -> str:
    """Where it came from, as `load` takes it: a path, or a hub id with its revision instead of a place in the cache."""
    if lora.source is None:
        return f"{_IN_MEMORY}{lora.name}"
    return of_cache(lora.source.as_posix()) or str(lora.source)


def _utf8(text: str) -> str:
    """A name as TOML can hold it: of a file whose name is no UTF-8, the odd bytes are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_STEP_NAMES = {"scaled": "scales"}


def leaves(lora: LoadedLora, scale: float) -> Iterator[tuple[LoadedLora, float]]:
    """The files behind a baked adapter that was itself stacked again."""
    if not lora.origin or lora.history or lora.made:
        yield lora, scale
        return
    for part, own in lora.origin:
        yield from leaves(part, own * scale)


def _table(one: Ingredient) -> dict[str, Any]:
    table: dict[str, Any] = {"source": one.source, "scale": one.scale}
    if one.name:
        table["name"] = one.name
    if one.steps:
        table["steps"] = [{step: value} for step, value in one.steps]
    if one.sha256:
        table["sha256"] = dict(one.sha256)
    return table
