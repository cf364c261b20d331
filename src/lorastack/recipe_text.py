"""The text of a recipe: read up to a bound, refused where reading it would take more than it holds, and its tables."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorastack.core.patterns import FirstMatch, PatternError
from lorastack.errors import ArgumentError, Problems, shown
from lorastack.files import present, read_regular
from lorastack.formats.provenance import Ingredient

#: A recipe of ten thousand adapters has less.
MAX_BYTES = 1 << 20
#: Parts of one dotted key; what tomllib keeps of them grows by the square.
MAX_PARTS = 32
#: Keys of the whole, of an adapter, and steps that change one; the docs have a table of them.
KEYS = {"adapter", "base", "lorastack"}
ADAPTER_KEYS = {"source", "scale", "name", "select", "scales", "steps", "sha256"}
STEPS = {"select", "scales", "names", "rename", "without_extras", "lokr_rank"}

#: Comments and strings, closed or not; the dots in them are no keys'.
_QUOTED = re.compile(
    r"#[^\n]*+"
    r'|"""(?:[^"\\]|\\(?:.|\Z)|"{1,2}(?!"))*+"{0,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*+'{0,5}"
    r'|"(?:[^"\\\n]|\\[^\n])*+"?'
    r"|'[^'\n]*+'?",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[=,\[\]{}\n]")


def read_text(path: Path) -> str:
    """The text of a recipe."""
    try:
        return read_regular(path, MAX_BYTES, ArgumentError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: the recipe cannot be read: it is no UTF-8 text ({error})") from error


def values_of(text: str, label: str) -> dict[str, Any]:
    """The TOML in ``text``.

    Raises
    ------
    ArgumentError
        When it is none, or too large or too deep.
    """
    if len(text) > MAX_BYTES:
        raise ArgumentError(f"{label}: it has {len(text):,} characters, at most {MAX_BYTES:,} are read")
    deepest = max(piece.count(".") for piece in _BETWEEN.split(_QUOTED.sub("_", text)))
    if deepest > MAX_PARTS:
        raise ArgumentError(f"{label}: a key of it has {deepest + 1:,} parts, at most {MAX_PARTS} are read")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ArgumentError(f"{label}: it is nested too deep") from None
    except ValueError as error:  # no TOML, or a number of thousands of digits
        raise ArgumentError(f"{label}: it is no TOML: {error}") from error


def located(source: str, folder: Path | None) -> str:
    """A path of a recipe as it leads from here: one that is there is relative to the recipe's folder."""
    if folder is not None and not Path(source).is_absolute() and present(folder / source):
        return str(folder / source)
    return source


def ingredient_of(n: int, table: dict[str, Any], folder: Path | None, problems: Problems) -> Ingredient | None:
    """The adapter that a table says; None, with the reasons in ``problems``, when it has no meaning."""
    where = f"adapter {n + 1}"
    before = len(problems.lines)
    for key in sorted(set(table) - ADAPTER_KEYS):
        problems.add(f"{where}: key {shown(key)} is not known; there are {', '.join(sorted(ADAPTER_KEYS))}")
    source, scale, name = table.get("source"), table.get("scale", 1.0), table.get("name")
    if not isinstance(source, str) or not source:
        problems.add(f"{where}: source is {shown(source)}, expected a path or hub id")
    if not _finite(scale):
        problems.add(f"{where}: scale is {shown(scale)}, expected a finite number")
    if name is not None and not isinstance(name, str):
        problems.add(f"{where}: name is {shown(name)}, expected text")
    steps: list[tuple[str, Any]] = [(key, table[key]) for key in ("select", "scales") if key in table]
    said = table.get("steps", [])
    for step in said if isinstance(said, list) else [said]:
        word = step if isinstance(step, str) else shown(step)
        steps += list(step.items()) if isinstance(step, dict) else [(word[:80], None)]
    for step, value in steps:
        if not _good_step(step, value):
            problems.add(
                f"{where}: step {step[:80]} = {shown(value)} has no meaning; there are {', '.join(sorted(STEPS))}"
            )
    sums = table.get("sha256", {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        problems.add(f"{where}: sha256 is {shown(sums)}, expected file names with hashes")
    if len(problems.lines) > before:
        return None
    return Ingredient(located(str(source), folder), float(scale), name, tuple(steps), tuple(sorted(sums.items())))


def _good_step(step: str, value: Any) -> bool:
    if step == "scales":
        return isinstance(value, dict) and all(map(_finite, value.values())) and _good_patterns(value)
    if step == "select":
        return isinstance(value, str) and _good_patterns([value])
    if step == "rename":
        return isinstance(value, dict) and all(isinstance(new, str) for new in value.values())
    if step == "names":
        return value in ("gguf", "hf")
    if step == "lokr_rank":
        return type(value) is int and value > 0
    return step == "without_extras" and isinstance(value, list) and all(isinstance(kind, str) for kind in value)


def _good_patterns(patterns: Iterable[str]) -> bool:
    try:
        return bool(FirstMatch(patterns))
    except PatternError:
        return False


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # TOML's whole numbers may have any length
        return False
