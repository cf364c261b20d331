"""Patterns over names of weights and modules: matched in linear time, or given up after a moment.

Patterns come out of files that anyone may have written, and a backtracking matcher can be kept busy for ever by thirty
letters. So a pattern without special characters is looked up in a table; what RE2 takes, and means as Python does, RE2
matches in linear time; the rest (lookaround, backreferences, other alphabets) goes to the ``regex`` package, which can
be stopped. A compiled ``re.Pattern`` is the caller's own, and is used as it is.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

import re2
import regex

from lorastack.errors import ArgumentError, FormatError, shown

T = TypeVar("T")
Pattern = str | re.Pattern[str]

#: No pattern with special characters is longer; alternatives by the hundred fit.
MAX_LENGTH = 10_000
#: What compiling and matching the patterns of one table may take of this thread's time, in all.
SECONDS = 2.0

#: Syntax that RE2 and Python read alike; `{,3}`, `[[:alpha:]]` or `\z` are not among it.
_COMMON = re.compile(
    r"(?:[^\\()\[\]{}]|\\[^a-zA-Z0-9]|\\[dwsDWSbB]|\((?!\?)|\(\?:|\)|\[\^?+(?:[^\[\]\\]|\\[^a-zA-Z0-9]|\\[dwsDWS])++\]"
    r"|\{\d{1,4}+(?:,\d{0,4}+)?\})*+"
)
#: What the regex package reads otherwise than Python: fuzzy matches like `a{e<=1}`, `[[:alpha:]]`.
_OTHERWISE = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})|\[:\^?\w+:\]")
#: ``{n}`` or ``{n,m}`` with what it repeats.
_REPEAT = re.compile(r"(.)\{(\d+)(?:,(\d*))?\}", re.DOTALL)
#: Names out of files have at most so many letters.
_MOST_REPEATS = 1_000
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 20
_OPTIONS.never_capture = True  # only whether they match is asked, and thousands of groups take hundreds of megabytes


class PatternError(ArgumentError):
    """A pattern cannot be read, or takes too long to match."""


class Allowance:
    """The time that the patterns of one table may take, in all."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = self.left = seconds

    def spend(self, work: Callable[[float], T]) -> T:
        """What ``work`` returns, which is told how many seconds are left."""
        if self.left <= 0:
            raise self._over()
        before = time.thread_time()
        try:
            return work(self.left)
        except TimeoutError:
            self.left = 0.0
            raise self._over() from None
        finally:
            self.left -= time.thread_time() - before

    def _over(self) -> PatternError:
        return PatternError(f"patterns take more than {self.seconds:g} s to match; write simpler or fewer ones")


class Expression:
    """A regular expression as text, with Python's meaning: names match as a whole, or (``start``) by their start."""

    __slots__ = ("_allowance", "_how", "_linear", "_text", "_timed")

    def __init__(self, text: str, allowance: Allowance, start: bool = False) -> None:
        _check_length(text)
        self._text = text
        self._allowance = allowance
        self._how = "match" if start else "fullmatch"
        self._linear = allowance.spend(lambda _: _linear(text, self._how))
        self._timed = None if self._linear else allowance.spend(lambda _: _timed(text, self._how))

    def hits(self, name: str) -> bool:
        """Whether ``name`` matches."""
        # Python's \w and \s know every alphabet, and its $ a line's end; RE2's do not.
        if self._linear and name.isascii() and name.isprintable():
            linear = self._linear
            return self._allowance.spend(lambda _: linear(name) is not None)
        timed = self._timed = self._timed or self._allowance.spend(lambda _: _timed(self._text, self._how))
        return self._allowance.spend(lambda left: timed(name, timeout=left) is not None)


def _check_length(text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise PatternError(f"it has {len(text):,} characters, more than {MAX_LENGTH:,}")


def _check_repeats(text: str) -> None:
    """Refuse repeats beyond any name's length, which the regex package writes out one by one as it compiles them."""
    simple, grouped = 1, 1
    for before, most in ((found[1], found[3] or found[2]) for found in _REPEAT.finditer(text)):
        count = int(most.lstrip("0")[:20] or 0)
        simple = max(simple, count)
        grouped *= max(count, 1) if before == ")" else 1  # perhaps one within the other
    if simple > _MOST_REPEATS or simple * grouped > 10 * _MOST_REPEATS:
        raise PatternError(f"it is no regular expression read here (repeats of more than {_MOST_REPEATS:,} letters)")


def _linear(text: str, how: str) -> Callable[[str], Any] | None:
    """RE2's way to match it; None where RE2 refuses it, or might mean something else by it."""
    if not (text.isascii() and text.isprintable() and _COMMON.fullmatch(text)):
        return None
    try:
        return getattr(re2.compile(text, _OPTIONS), how)
    except re2.error:
        return None


def _timed(text: str, how: str) -> Callable[..., Any]:
    """The way to match it that can be stopped, for what Python's own ``re`` takes too."""
    if odd := _OTHERWISE.search(text):
        raise PatternError(f"it is no regular expression read here ({odd[0]} at {odd.start()}); write \\ before it")
    _check_repeats(text)
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(text)
        # Before it matches, the package looks for the longest plain part of a pattern in the name, in cubic time and
        # without its clock. With an alternative that matches nothing, no part has to be there.
        return getattr(regex.compile("(?!)|" + text), how)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise PatternError(f"it is no regular expression ({error})") from None


class Matcher:
    """Whether names as a whole match a glob, a compiled regex, or one written as ``"re:..."``.

    >>> [Matcher(p)("blk.0.attn_q.weight") for p in ("blk.*.weight", "re:blk", "re:blk.*", "blk")]
    [True, False, True, False]
    """

    def __init__(self, pattern: Pattern, allowance: Allowance | None = None) -> None:
        self.pattern = pattern
        with _saying(pattern):
            self._hits = _plan(pattern, allowance or Allowance())

    def __call__(self, name: str) -> bool:
        with _saying(self.pattern):
            return self._hits(name)


def _plan(pattern: Pattern, allowance: Allowance) -> Callable[[str], bool]:
    if not isinstance(pattern, str):
        return lambda name: pattern.fullmatch(name) is not None
    if pattern.startswith("re:"):
        return Expression(pattern[3:], allowance).hits
    _check_length(pattern)
    # Globs are linear as they are: fnmatch lets no star give back what it took.
    return lambda name: allowance.spend(lambda _: fnmatchcase(name, pattern))


@contextlib.contextmanager
def _saying(pattern: Pattern) -> Iterator[None]:
    """Put the pattern before what is said about it."""
    try:
        yield
    except PatternError as error:
        raise PatternError(f"pattern {shown(pattern)}: {error}") from None


class FirstMatch:
    """Which of several patterns is the first that a name as a whole matches, by its number."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._exact: dict[str, int] = {}
        self._others: list[tuple[int, Matcher]] = []
        allowance = Allowance()
        for number, pattern in enumerate(patterns):
            if isinstance(pattern, str) and not pattern.startswith("re:") and not set(pattern) & set("*?["):
                self._exact.setdefault(pattern, number)
            else:
                self._others.append((number, Matcher(pattern, allowance)))

    def first(self, name: str) -> int | None:
        """The number of the first pattern that ``name`` matches; None where there is none."""
        exact = self._exact.get(name)
        for number, hits in self._others:
            if exact is not None and exact < number:
                break
            if hits(name):
                return number
        return exact

    def without_hit(self, names: Collection[str]) -> list[Pattern]:
        """The patterns that none of the names matches."""
        dead: list[tuple[int, Pattern]] = [(number, text) for text, number in self._exact.items() if text not in names]
        dead += [(number, hits.pattern) for number, hits in self._others if not any(map(hits, names))]
        return [pattern for _, pattern in sorted(dead, key=lambda one: one[0])]


class PatternTable(Generic[T]):
    """The keys of PEFT's ``rank_pattern`` or ``alpha_pattern`` with their values: the first key that hits counts.

    PEFT's rule (``peft.utils.get_pattern_key``) is ``re.match(rf"(.*\\.)?({key})$", name)``: a key matches the end of a
    module's path, after a dot. A dot in a key is any character, which the look-up of plain keys honours too.

    >>> table = PatternTable({"q_proj": 4, "^model.k_proj": 8, "layers.[0-3].*": 16})
    >>> [table.first(f"model.{name}", 0) for name in ("q_proj", "k_proj", "layers.2.v_proj", "layers.7.v_proj")]
    [4, 8, 16, 0]
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = list(values.values())
        self._found: dict[str, int | None] = {}
        self._plain = _PlainKeys()
        self._others: list[tuple[int, Expression]] = []
        self._allowance = Allowance()
        #: Keys that cannot be matched, each with why. Check it before asking for names.
        self.bad: dict[str, str] = {}
        for number, key in enumerate(values):
            if self._plain.take(key, number):
                continue
            try:
                self._others.append((number, Expression(rf"(.*\.)?({key})$", self._allowance, start=True)))
            except PatternError as error:
                self.bad[key] = str(error)
                if self._allowance.left <= 0:
                    break

    def __bool__(self) -> bool:
        return bool(self._values)

    def first(self, name: str, default: T) -> T:
        """The value of the first key that hits ``name``.

        Raises
        ------
        FormatError
            When matching takes too long.
        """
        try:
            number = self._found[name]
        except KeyError:
            number = self._found[name] = self._first(name)
        return default if number is None else self._values[number]

    def _first(self, name: str) -> int | None:
        try:
            plain = self._allowance.spend(lambda _: self._plain.first(name))
            for number, key in self._others:
                if plain is not None and plain < number:
                    break
                if key.hits(name):
                    return number
        except PatternError as error:
            raise FormatError(f"module {shown(name)}: {error}") from None
        return plain


#: Where the pieces between dots lie -> the pieces -> the number of the first such key.
_Shapes = dict[tuple[tuple[int, int], ...], dict[tuple[str, ...], int]]


class _PlainKeys:
    """Keys of letters and dots, by their shape: how long, and where the dots are that stand for any character."""

    #: ``^``, then characters that mean themselves, escaped ones, and dots.
    _PLAIN = re.compile(r"(\^?)((?:[^\\.^$*+?{}\[\]|()\n]|\\[^a-zA-Z0-9\n]|\.)++)")
    _PIECE = re.compile(r"((?:[^\\.]|\\.)+)|\.")

    def __init__(self) -> None:
        self._keys: dict[bool, dict[int, _Shapes]] = {False: {}, True: {}}  # anchored -> length -> the keys

    def take(self, key: str, number: int) -> bool:
        """Keep a key of this kind; False where it is another."""
        if not (match := self._PLAIN.fullmatch(key)):
            return False
        at, spans, pieces = 0, [], []
        for piece in self._PIECE.finditer(match[2]):
            text = re.sub(r"\\(.)", r"\1", piece[1] or ".")
            if piece[1]:
                spans.append((at, at + len(text)))
                pieces.append(text)
            at += len(text)
        shapes = self._keys[bool(match[1])].setdefault(at, {})
        shapes.setdefault(tuple(spans), {}).setdefault(tuple(pieces), number)
        return True

    def first(self, name: str) -> int | None:
        """The number of the first key that hits ``name``."""
        if "\n" in name:  # where ^, $ and . have other meanings
            raise PatternError("a name has a line end in it")
        starts = [0, *(at.end() for at in re.finditer(r"\.", name))]
        found = [self._at(name, start, False) for start in starts] + [self._at(name, 0, True)]
        return min((number for number in found if number is not None), default=None)

    def _at(self, name: str, start: int, anchored: bool) -> int | None:
        shapes = self._keys[anchored].get(len(name) - start)
        if not shapes:
            return None
        text = name[start:]
        found = [keys.get(tuple(text[a:z] for a, z in spans)) for spans, keys in shapes.items()]
        return min((number for number in found if number is not None), default=None)
