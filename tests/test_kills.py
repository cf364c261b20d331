"""Ended inside any system call while an adapter is written: no partial output, and the next run leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, lacking

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs strace")
HOWS = ("save", "bake", "resize", "bake gguf")
#: Such that an output goes through each of them.
COMMON = {"mkdir", "openat", "write", "fsync", "close"}


def ended(folder: Path, how: str, renameat2: str, count: int) -> list[dict[str, Any]]:
    """What tests/killing.py found, checked."""
    if shutil.which("strace") is None:
        lacking("strace is not installed (apt-get install strace)")
    words = [sys.executable, "-m", "tests.killing", str(folder), how, renameat2, str(count)]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1")
    )
    if "cannot trace here" in done.stderr:
        lacking("strace may not trace here")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for one in found:
        where = f"{'--force, ' if one['force'] else ''}{one['signal']} at {one['call']} {one['which']}: {one}"
        if one["state"] is None and one["force"]:  # it steps aside for a moment where there is no renameat2
            assert renameat2 == "lacking", where
            assert one["aside"], where
        else:
            assert one["state"] in (("1", "2") if one["force"] else (None, "2")), where
        if one["signal"] == "SIGTERM" and how != "save":  # which leaves signals to whoever calls it
            assert one["left"] == [], where
            assert one["state"] is not None or not one["force"], where
        assert (one["again"], one["whole"], one["names"]) == (0, True, [one["target"]]), where
    signals = Counter(one["signal"] for one in found if hit(one))
    assert all(signals[name] >= 0.3 * count for name in ("SIGKILL", "SIGTERM")), signals
    assert {one["call"] for one in found if hit(one)} >= COMMON, Counter(one["call"] for one in found)
    return found


def hit(one: dict[str, Any]) -> bool:
    """Whether the signal ended the process: by itself, or through the command's own ending."""
    status = one["status"]
    number = getattr(signal, one["signal"])
    return os.WTERMSIG(status) == number if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) == 128 + number


@pytest.mark.parametrize(("how", "renameat2"), [("save", "lacking"), ("bake", "there"), ("bake gguf", "there")])
def test_ended_in_a_system_call(tmp_path: Path, how: str, renameat2: str) -> None:
    found = ended(tmp_path, how, renameat2, 48)
    assert len(found) == 48
    assert sum(map(hit, found)) > 24


@pytest.mark.slow
@pytest.mark.parametrize("renameat2", ["there", "lacking"])
@pytest.mark.parametrize("how", HOWS)
def test_ended_in_a_hundred_system_calls(tmp_path: Path, how: str, renameat2: str) -> None:
    found = ended(tmp_path, how, renameat2, 100)
    assert len(found) == 100
