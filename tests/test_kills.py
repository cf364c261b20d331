"""Killed inside any system call while an adapter is written: no partial output, and the next run leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import lacking

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs strace")
CALLS = "mkdir,openat,write,fsync,rename,renameat2,link,unlink,unlinkat,rmdir,chmod,fchmodat,flock,close,newfstatat"

#: Forks children that have everything imported already and stop themselves; each is traced, goes on, and is killed.
SERVER = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
from lorastack import LoadedLora, load, save
from lorastack.files import moves

folder, calls, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[4])
if sys.argv[3] == "lacking":
    moves._function = lambda: None

def lora(value):
    pair = (np.full((2, 6), value, np.float32), np.ones((5, 2), np.float32))
    return LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}, name="x", naming="hf")

def value():
    path = folder / "a"
    if not os.path.lexists(path):
        return None
    return float(load(path).adapters["model.layers.0.self_attn.q_proj.weight"].a[0, 0])

def child(force, *options):
    pid = os.fork()
    if not pid:
        os.kill(os.getpid(), signal.SIGSTOP)
        save(lora(2), folder / "a", force=force)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-qq", *options, "-p", str(pid)], stderr=subprocess.DEVNULL)
    while "TracerPid:\\t0\\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None:
            os.kill(pid, signal.SIGKILL)
            sys.exit("strace cannot trace here")
        time.sleep(0.002)
    os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, 0)[1]
    tracer.wait()
    return status

def fresh(force):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if force:
        save(lora(1), folder / "a")

save(lora(2), folder.with_name("warm"))
found = []
for force in (False, True):
    fresh(force)
    log = folder.with_name("log")
    child(force, "-e", f"trace=?{calls.replace(',', ',?')}", "-o", str(log))
    said = [line.partition("(")[0] for line in log.read_text().splitlines() if "(" in line and line[0].isalpha()]
    points = [(call, 1 + said[:n].count(call)) for n, call in enumerate(said)]
    step = max(1, len(points) * 2 // count)
    for call, number in points[::step]:
        fresh(force)
        options = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}", "-o", "/dev/null")
        status = child(force, *options)
        killed, left = os.WIFSIGNALED(status), value()
        aside = [str(p.relative_to(folder)) for p in folder.glob(".*.partial/old/*")]
        save(lora(3), folder / "a", force=True)
        now = sorted(path.name for path in folder.iterdir())
        found.append([force, call, number, killed, left, bool(aside), value(), now])
print(json.dumps(found))
"""


@pytest.mark.parametrize("renameat2", ["there", "lacking"])
def test_killed_in_a_system_call(tmp_path: Path, renameat2: str) -> None:
    if shutil.which("strace") is None:
        lacking("strace is not installed (apt-get install strace)")
    words = [sys.executable, "-c", SERVER, str(tmp_path / "work"), CALLS, renameat2, "100"]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    if "cannot trace here" in done.stderr:
        lacking("strace may not trace here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    killed = [one for one in found if one[3]]
    assert len(killed) >= 60, f"only {len(killed)} of {len(found)} were killed"
    for force, call, number, _, left, aside, after, names in found:
        where = f"{'--force, ' if force else ''}killed at {call} {number}"
        assert left in ((1, 2) if force else (None, 2)) or (left is None and aside), f"{where}: it is {left}"
        assert after == 3, where
        assert names == ["a"], f"{where}: {names}"
    assert {re.sub(r"\d", "", one[1]) for one in killed} >= {"mkdir", "openat", "fsync"}
