"""What a hostile file may cost: one error of ours, soon, with memory in proportion to the file."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from lorastack import load
from lorastack.errors import LoraStackError

#: A constant for the libraries' own objects, and so many bytes for each byte of the file.
CONSTANT, FACTOR = 64 << 20, 64
SECONDS = 5.0


def refused(path: Path) -> LoraStackError:
    """The error that loading ``path`` raises, once its cost is known to be bounded."""
    caught: LoraStackError | None = None
    tracemalloc.start()
    began = time.process_time()
    try:
        load(path).check()
    except LoraStackError as error:
        caught = error
    finally:
        took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if caught is None:
        pytest.fail("it was loaded")
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_blocks * 512 for file in files)
    assert peak < CONSTANT + FACTOR * size, f"{peak} bytes for a file of {size}"
    assert took < SECONDS
    assert len(str(caught)) < 4096 + FACTOR * size
    return caught
