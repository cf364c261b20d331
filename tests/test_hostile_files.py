"""The small hostile files that come with the repository: each is refused at once, with its name and a reason."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from lorastack import load
from lorastack.errors import FormatError
from tests.fixtures.make_hostile import HERE

FILES = sorted(HERE.iterdir())


def test_there_are_files_and_they_are_small() -> None:
    assert len(FILES) == 16
    assert sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file()) < 20_000


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_hostile_file_is_refused_at_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path.name == "running_pickle":
        pytest.importorskip("torch")
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(FormatError, match=path.stem):
        load(path)
    took, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, f"{peak >> 20} MiB for a file of {sum(f.stat().st_size for f in [path])} bytes"
    assert took < 2, f"{took:.1f} s"
    assert not Path("PICKLE_WAS_RUN").exists()


def test_the_pickle_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import pickle

    pickle.loads((HERE / "running_pickle" / "adapter_model.bin").read_bytes())
    assert Path("PICKLE_WAS_RUN").exists()
