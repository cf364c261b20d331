"""Names of mixtures: an adapter with its scale, as people write it on a command line."""

from __future__ import annotations

import math
from pathlib import Path

from lorastack.errors import ArgumentError, shown
from lorastack.files import present


def parse_entry(word: str) -> tuple[str, float]:
    """Split ``FILE:SCALE``; the scale is 1 where there is none.

    A colon that belongs to the path stays there: a Windows drive, or a file that exists by that name.

    >>> parse_entry("zara:0.7"), parse_entry("zara"), parse_entry("C:/loras/zara.gguf")
    (('zara', 0.7), ('zara', 1.0), ('C:/loras/zara.gguf', 1.0))

    Raises
    ------
    ArgumentError
        When the scale is no finite number.
    """
    path, colon, tail = word.rpartition(":")
    if not colon or not path or present(Path(word)):
        return word, 1.0
    try:
        scale = float(tail)
    except ValueError:
        # C:\loras\zara.gguf and C:/loras/zara.gguf: the colon of a drive
        if len(path) == 1 and path.isalpha() and tail[:1] in ("\\", "/"):
            return word, 1.0
        raise ArgumentError(
            f"{shown(word)}: {shown(tail)} is no scale; write FILE:SCALE, as in {path[:80]}:0.7"
        ) from None
    if not math.isfinite(scale):
        raise ArgumentError(f"{shown(word)}: a scale is a finite number, got {tail[:80]}")
    return path, scale
