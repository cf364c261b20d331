"""What a command line says of a stack: ``FILE:SCALE`` words, as llama.cpp writes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from lorastack.errors import ArgumentError, LoraStackError, Problems
from lorastack.formats import load
from lorastack.stack import LoraStack


def parse_entry(word: str) -> tuple[str, float]:
    """Split ``FILE:SCALE``; the scale is 1 where there is none.

    A colon that belongs to the path stays there: a Windows drive, or a file that exists by that name.

    >>> parse_entry("zara:0.7"), parse_entry(r"C:\\\\loras\\\\zara.gguf"), parse_entry("zara")
    (('zara', 0.7), ('C:\\\\\\\\loras\\\\\\\\zara.gguf', 1.0), ('zara', 1.0))

    Raises
    ------
    ArgumentError
        When the scale is no finite number.
    """
    path, colon, tail = word.rpartition(":")
    if not colon or not path or Path(word).exists():
        return word, 1.0
    try:
        scale = float(tail)
    except ValueError:
        # C:\loras\zara.gguf and C:/loras/zara.gguf: the colon of a drive
        if len(path) == 1 and path.isalpha() and tail[:1] in ("\\", "/"):
            return word, 1.0
        raise ArgumentError(f"{word!r}: {tail!r} is no scale; write FILE:SCALE, as in {path}:0.7") from None
    if not math.isfinite(scale):
        raise ArgumentError(f"{word!r}: a scale is a finite number, got {tail}")
    return path, scale


def load_stack(words: Iterable[str], *, allow_nonfinite: bool = False, ignore: Collection[str] = ()) -> LoraStack:
    """Load every ``FILE:SCALE`` and push it; one error lists all that cannot be loaded."""
    stack = LoraStack()
    problems = Problems("cannot load the stack")
    failed: LoraStackError | None = None
    for word in words:
        try:
            path, scale = parse_entry(word)
            stack.push(load(path, allow_nonfinite=allow_nonfinite, ignore=ignore), scale)
        except LoraStackError as error:
            failed = error
            problems.add(str(error).replace("\n", "\n  "))
    if failed is not None and len(problems.lines) == 1:
        raise failed
    problems.raise_any(ArgumentError)
    return stack
