"""The text of a recipe as values: read up to a bound, and refused where reading it would take more than it holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from lorastack.errors import ArgumentError
from lorastack.files import read_regular

#: A recipe of ten thousand adapters has less.
MAX_BYTES = 1 << 20
#: Parts of one dotted key; what tomllib keeps of them grows by the square.
MAX_PARTS = 32

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
