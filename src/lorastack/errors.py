"""What can go wrong, as a few exception types, and the collector that reports every problem at once."""

from __future__ import annotations

from collections.abc import Iterable


class LoraStackError(Exception):
    """Base of every error this package raises on purpose.

    ``problems`` holds one line per problem found; the message shows all of them.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n  - ".join([message, *self.problems]))


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

    def __bool__(self) -> bool:
        return bool(self.lines)

    def add(self, line: str) -> None:
        self.lines.append(line)

    def raise_any(self, kind: type[LoraStackError]) -> None:
        """Raise ``kind`` with every line collected; do nothing when there is none."""
        if self.lines:
            count = len(self.lines)
            raise kind(f"{self.subject}: {count} problem{'s' if count > 1 else ''}", self.lines)


def require(module: str, extra: str) -> object:
    """Import ``module`` or raise `MissingDependencyError` naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs {module}, which is not installed ({error}); run: pip install 'lorastack[{extra}]'"
        ) from error
