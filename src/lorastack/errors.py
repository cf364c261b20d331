"""What can go wrong, as a few exception types, and the collector that reports every problem at once."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shown(value: object) -> str:
    """A value out of a file as a message shows it: however long or deep it is, on one line.

    >>> shown([[[[[[[[]]]]]]]])
    '[[[[[[[...]]]]]]]'
    """
    return _REPR.repr(value)


_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069"
#: What a terminal obeys: controls but line end and tab, overrides of direction; halves of pairs cannot be written.
_OBEYED = re.compile(f"[{_CONTROLS}]")
#: And what nobody sees in a name, of which two could look the same; text may have it.
_UNSEEN = re.compile(f"[{_CONTROLS}\u061c\u200b\u200e\u200f\u2028\u2029\u2060-\u206f\ufeff\U000e0000-\U000e007f]")


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str, escaped: Callable[[int], str] = _escaped, prose: bool = False) -> str:
    """A text out of a file or a name as a terminal may show it: what it would obey is spelt out.

    ``prose``, which a model wrote, keeps the marks that some scripts are written with.

    >>> printable("a\\tb\\x1b[2J\\u202ec")
    'a\\tb\\\\x1b[2J\\\\u202ec'
    """
    return (_OBEYED if prose else _UNSEEN).sub(lambda found: escaped(ord(found[0])), text)


def _readable(message: str) -> str:
    """A message without control characters, in lines that somebody can read: a name may have a megabyte."""
    lines = printable(message).split("\n")
    return "\n".join(line if len(line) <= 3000 else f"{line[:1500]} ... {line[-1000:]}" for line in lines)


def did_you_mean(word: str, names: Iterable[str], where: str = "", cutoff: float = 0.6) -> str:
    """The names nearest to a word, each behind ``where``, as the end of a message; empty when none is near.

    >>> did_you_mean("exited", ["excited", "luna"])
    '; did you mean excited?'
    """
    from difflib import get_close_matches

    near = get_close_matches(word[:200], list(dict.fromkeys(names))[:2000], n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(where + name for name in near)}?" if near else ""


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a file's name may have bytes in it that are no letters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class LoraStackError(Exception):
    """Base of every error this package raises on purpose.

    ``problems`` holds one line per problem found; the message shows all of them.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(_readable(problem) for problem in problems)
        super().__init__("\n  - ".join([_readable(message), *self.problems]))


class FormatError(LoraStackError):
    """A file is damaged, is not a LoRA adapter, or is an adapter of a format not read here."""


class ShapeError(LoraStackError, ValueError):
    """Arrays do not fit each other, the input, or the weight they belong to."""


class NonFiniteError(LoraStackError, ValueError):
    """A factor holds NaN or Inf and ``allow_nonfinite`` was not given."""


class NamingError(LoraStackError, ValueError):
    """Names of two kinds (GGUF, Hugging Face, own) meet where only one can be meant."""


class UnsupportedError(LoraStackError):
    """The adapter is read correctly, but this operation cannot honour part of it."""


class UnknownNameError(LoraStackError, LookupError):
    """No adapter or weight has the name asked for; the message lists those there are."""


class ArgumentError(LoraStackError, ValueError):
    """A call or a command line asks for something that has no meaning."""


class MissingDependencyError(LoraStackError, ImportError):
    """An optional package is needed; the message gives the ``pip install`` line."""


class LoraStackWarning(UserWarning):
    """Something is as asked for, and yet not all that the caller may think it is."""


class Problems:
    """Collects problems while a file or a request is checked, so that one error can list them all.

    >>> problems = Problems("cannot load x.gguf")
    >>> problems.add("tensor blk.0.attn_q.weight.lora_a has no lora_b; save the adapter again")
    >>> problems.raise_any(FormatError)
    Traceback (most recent call last):
    ...
    lorastack.errors.FormatError: cannot load x.gguf: 1 problem
      - tensor blk.0.attn_q.weight.lora_a has no lora_b; save the adapter again
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.lines: list[str] = []
        self._errors: list[LoraStackError] = []

    def __bool__(self) -> bool:
        return bool(self.lines)

    def add(self, problem: str | LoraStackError) -> None:
        """Note a problem: a line, or an error caught on the way, with all it lists."""
        if isinstance(problem, LoraStackError):
            self._errors.append(problem)
            problem = str(problem).replace("\n", "\n  ")
        self.lines.append(problem)

    def raise_any(self, kind: type[LoraStackError]) -> None:
        """Raise ``kind`` with every line collected; do nothing when there is none.

        A single error that was caught is raised again as it was.
        """
        if len(self.lines) == len(self._errors) == 1:
            raise self._errors[0]
        if self.lines:
            count = len(self.lines)
            raise kind(f"{self.subject}: {count} problem{'s' if count > 1 else ''}", self.lines)


class Failures:
    """Collects errors while work goes on, so that one error can list them all."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.errors: list[LoraStackError] = []

    def __bool__(self) -> bool:
        return bool(self.errors)

    def get(self, compute: Callable[[], T]) -> T | None:
        """What ``compute`` returns; None, with the error kept, when it raises one of ours."""
        try:
            return compute()
        except LoraStackError as error:
            self.errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise the error there was, or one that lists them all, of their kind if they have one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            kinds = {type(error) for error in self.errors}
            problems = Problems(self.subject)
            problems.lines = [line for error in self.errors for line in error.problems or [str(error)]]
            problems.raise_any(kinds.pop() if len(kinds) == 1 else FormatError)


def require(module: str, extra: str) -> object:
    """Import ``module`` or raise `MissingDependencyError` naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs {module}, which is not installed ({error}); run: pip install 'lorastack[{extra}]'"
        ) from error
