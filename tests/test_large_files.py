"""Files of gigabytes are written part after part, and are on their way to the disk while they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lorastack.files import large
from lorastack.files.large import LargeFile


def test_what_is_written_is_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "PART", 1000)
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(int(size)).astype(np.float32) for size in rng.integers(0, 700, 40)]
    with LargeFile(tmp_path / "file") as file:
        file.write(b"head")
        for part in parts:
            file.write(part)
    assert (tmp_path / "file").read_bytes() == b"head" + np.concatenate(parts).tobytes()


def test_every_part_is_handed_to_the_disk_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system takes no advice on files")
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(large, "PART", 1000)
    monkeypatch.setattr(large, "_ADVISE", lambda descriptor, start, size, advice: said.append((start, start + size)))
    with LargeFile(tmp_path / "file") as file:
        for _ in range(35):
            file.write(bytes(100))
    assert said == [(0, 1000), (0, 2000), (1000, 3000)]


def test_a_disk_that_takes_less_than_it_is_given_is_given_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LargeFile(tmp_path / "file") as file:
        whole = file._file.write

        class Slow:
            write = staticmethod(lambda data: whole(data[:7]))
            fileno = staticmethod(file._file.fileno)
            close = staticmethod(file._file.close)

        monkeypatch.setattr(file, "_file", Slow)
        file.write(bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))
