"""Names of mixtures: an adapter with its scale, as a command line has it, and a stack, as a request names it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path
from typing import NamedTuple

from lorastack.errors import ArgumentError, UnknownNameError, shown
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


#: What an adapter is called where requests name it: no slash and no leading dot, so that no name leads out of a folder.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: No exponent and no plus sign, which stands between adapters.
_PART = re.compile(rf"({NAME.pattern})(?::(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)))?")
#: Adapters of one mixture, and characters of its name: a file's name has at most 255.
MAX_PARTS, MAX_NAME = 8, 1024
#: Sums of scales as they are written: 0.1 + 0.2 is 0.3.
_EXACT = Context(prec=2 * MAX_NAME)


@dataclass(frozen=True)
class Mixture:
    """A weighted stack by name, as a request for a model names it: ``zara:0.7+excited:0.3``.

    Attributes
    ----------
    scales
        Names with their scales, sorted by name, each name once, without those whose scale is 0.

    Example
    -------
    >>> str(Mixture.parse("zara:0.70+excited")), str(Mixture.parse("a:.1+b:0+a:0.20"))
    ('excited:1+zara:0.7', 'a:0.3')
    """

    scales: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """Of ``NAME:SCALE`` parts between plus signs; a scale left out is 1, those of a repeated name add up.

        Raises
        ------
        UnknownNameError
            When the text is the name of no mixture.
        ArgumentError
            When it has more than 8 parts, a scale that no float holds, or none but scales of 0.
        """
        if len(text) > MAX_NAME:
            raise UnknownNameError(f"{shown(text)} is no mixture: it has {len(text):,} characters, at most {MAX_NAME}")
        words = text.split("+")
        found = [_PART.fullmatch(word) for word in words]
        if wrong := [word for word, one in zip(words, found, strict=True) if one is None]:
            raise UnknownNameError(
                f"{shown(text)} is no mixture: {', '.join(map(shown, wrong[:3]))} is no NAME or NAME:SCALE; write "
                "zara:0.7+excited:0.3, names of letters, digits, '.', '_' and '-', scales without an exponent"
            )
        if len(words) > MAX_PARTS:
            raise ArgumentError(f"{shown(text)} has {len(words)} adapters, a mixture has at most {MAX_PARTS}")
        total: dict[str, Decimal] = {}
        for one in found:
            assert one is not None
            total[one[1]] = _EXACT.add(total.get(one[1], Decimal()), Decimal(one[2] or 1))
        scales = [(name, float(scale)) for name, scale in sorted(total.items())]
        if huge := [name for name, scale in scales if not math.isfinite(scale)]:
            raise ArgumentError(f"{shown(text)}: the scale of {', '.join(huge)} is larger than a float holds")
        if not any(scale for _, scale in scales):
            raise ArgumentError(f"{shown(text)}: every scale is 0, which is the base; ask for the base by its own name")
        return cls(tuple((name, scale) for name, scale in scales if scale))

    def __str__(self) -> str:
        """The one spelling of it: `parse` reads it as this mixture again."""
        return "+".join(f"{name}:{_shortest(scale)}" for name, scale in self.scales)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(self.scales)


def _shortest(scale: float) -> str:
    """The fewest decimals that are this float, without an exponent."""
    text = format(Decimal(repr(scale)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
