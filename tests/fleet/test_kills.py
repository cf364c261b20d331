"""Killed inside any system call while a mixture is baked: nothing partial at a final place, no lock is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, lacking


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs strace")
def test_killed_in_thirty_system_calls(tmp_path: Path, demo: Path) -> None:
    if shutil.which("strace") is None:
        lacking("strace is not installed (apt-get install strace)")
    words = [sys.executable, "-m", "tests.fleet.killing", str(tmp_path), str(demo / "base"), "30"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", NO_COLOR="1")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    if "cannot trace here" in done.stderr:
        lacking("strace may not trace here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 30
    for one in found:
        assert one["broken"] == [], one
        assert one["leased"], one
        assert one["still"], one
        assert one["again"] == 0, one  # no lock is left: it would wait for ever
        assert one["left"] == [], one
        assert one["leases"] <= 2, one  # this process's, and that of the one which ended last
        assert one["folders"] == 2, one
        assert one["bytes"] <= one["room"], one
    assert sum(one["killed"] for one in found) >= 20
