"""Names of mixtures: an adapter with its scale, as people write it on a command line."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from lorastack.errors import ArgumentError, shown
from lorastack.files import present


class AdapterSpec(NamedTuple):
    """An adapter as a word names it: where it is, its scale, and a name of the user's own."""

    source: str
    scale: float = 1.0
    name: str | None = None


#: A name in front of a path has nothing in it that a path is known by.
_NAMED = re.compile(r"([^=/\\:]+)=(.+)", re.DOTALL)


def parse_spec(word: str) -> AdapterSpec:
    """Split ``NAME=FILE:SCALE``; the scale is 1 where there is none, and a file may go by its own name.

    A colon or an equals sign that belongs to the path stays there: of a Windows drive, or of a file that exists by that
    name. Such a file's scale is written behind it: ``v1:0.5:0.7`` is the file ``v1:0.5`` at 0.7.

    >>> parse_spec("zara:0.7"), parse_spec("hers=loras/zara.gguf")
    (AdapterSpec(source='zara', scale=0.7, name=None), AdapterSpec(source='loras/zara.gguf', scale=1.0, name='hers'))
    >>> parse_spec("C:/loras/zara.gguf").source
    'C:/loras/zara.gguf'

    Raises
    ------
    ArgumentError
        When the scale is no finite number.
    """
    source, scale = parse_scale(word)
    if (found := _NAMED.fullmatch(source)) and not present(Path(source)):
        return AdapterSpec(found[2], scale, found[1].strip())
    return AdapterSpec(source, scale)


def parse_scale(word: str) -> tuple[str, float]:
    """Split ``NAME:SCALE``; the scale is 1 where there is none, or where a file has the whole as its name.

    >>> parse_scale("zara:0.7"), parse_scale("zara")
    (('zara', 0.7), ('zara', 1.0))
    """
    path, colon, tail = word.rpartition(":")
    if not colon or not path or present(Path(word)):
        return word, 1.0
    try:
        scale = float(tail)
    except ValueError:
        # C:\\loras\\zara.gguf and C:/loras/zara.gguf: the colon of a drive; https://...: of an address
        if tail[:1] in ("\\", "/") and (path[-2:-1] in ("", "=") or tail[:2] == "//"):
            return word, 1.0
        raise ArgumentError(
            f"{shown(word)}: {shown(tail)} is no scale; write FILE:SCALE, as in {path[:80]}:0.7"
        ) from None
    if not math.isfinite(scale):
        raise ArgumentError(f"{shown(word)}: a scale is a finite number, got {tail[:80]}")
    return path, scale


def parse_mixture(text: str) -> dict[str, float]:
    """Names with their scales, between spaces or commas; a name with spaces stands in quotes.

    >>> parse_mixture("zara:1, excited:0.5"), parse_mixture("'my style':0.5 zara"), parse_mixture("")
    ({'zara': 1.0, 'excited': 0.5}, {'my style': 0.5, 'zara': 1.0}, {})

    Raises
    ------
    ArgumentError
        When a scale is no finite number, a quote is not closed, or a name stands there twice.
    """
    reader = shlex.shlex(text, posix=True, punctuation_chars=False)
    reader.whitespace, reader.whitespace_split, reader.commenters = " \t\r\n,", True, ""
    reader.escape = ""  # a backslash is a letter of some names
    try:
        words = list(reader)
    except ValueError as error:
        raise ArgumentError(f"{shown(text)}: {str(error).lower()}; close the quotes") from None
    found = [parse_scale(word) for word in words]
    twice = {name for name, _ in found if sum(name == other for other, _ in found) > 1}
    if twice:
        raise ArgumentError(f"{shown(text)}: {', '.join(sorted(twice))} stands there twice; add its scales up")
    return dict(found)
