"""Killed in a system call, on a full disk, beside another run: there is no new base, or a whole one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack import merge
from lorastack.errors import LoraStackError
from tests.conftest import lacking
from tests.merge.stacks import adapters
from tests.merge.test_folder import everything, llama

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
CALLS = "mkdir,openat,write,fsync,rename,renameat2,link,unlink,unlinkat,rmdir,copy_file_range,sendfile,flock,close"

#: Forks children that have everything imported already and stop themselves; each is traced, goes on, and is killed.
SERVER = """
import hashlib, json, os, shutil, sys
from functools import partial
from pathlib import Path
from lorastack import merge
from tests.merge.stacks import adapters
from tests.traced import traced

work, calls, wanted = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
base, folder = work / "base", work / "outs"

def content(path):
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def run(force):
    merge(base, adapters(2), folder / "out", force=force, link=True)
    return 0

def fresh(force):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if force:
        merge(base, adapters(1), folder / "out", link=True)

fresh(False)
merge(base, adapters(1), folder / "out", link=True)
old = content(folder / "out")
fresh(False)
merge(base, adapters(2), folder / "out", link=True)
new, before = content(folder / "out"), content(base)
found = []
for force in (False, True):
    fresh(force)
    log = work / "log"
    traced(partial(run, force), "-f", "-e", f"trace=?{calls.replace(',', ',?')}", "-o", str(log))
    said = [line.split("(")[0].split()[-1] for line in log.read_text().splitlines() if "(" in line]
    mine = [call for call in said if call in calls.split(",")]
    points = [(call, 1 + mine[:n].count(call)) for n, call in enumerate(mine)]
    chosen = {point[0]: point for point in points}  # each call once, and others here and there
    for call, number in dict.fromkeys([*chosen.values(), *points[:: max(1, len(points) * 2 // wanted)]]):
        fresh(force)
        options = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}", "-o", "/dev/null")
        status = traced(partial(run, force), "-f", *options)
        there = content(folder / "out")
        state = "none" if there is None else "old" if there == old else "new" if there == new else "torn"
        aside = any(folder.glob(".*.partial/old/*"))
        merge(base, adapters(2), folder / "out", force=True, link=True)
        after = content(folder / "out") == new and sorted(p.name for p in folder.iterdir()) == ["out"]
        found.append([force, call, number, os.WIFSIGNALED(status), state, aside, after, content(base) == before])
print(json.dumps(found))
"""


@pytest.mark.parametrize("count", [4, pytest.param(48, marks=pytest.mark.slow)])
def test_killed_in_a_system_call_there_is_no_output_or_a_whole_one(count: int, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        lacking("strace is not installed (apt-get install strace)")
    llama(tmp_path / "base", "BF16", "10KB")
    words = [sys.executable, "-c", SERVER, str(tmp_path), CALLS, str(count)]
    root = Path(__file__).parents[2]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{root}:{os.environ.get('PYTHONPATH', '')}")
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=root)
    if "cannot trace here" in done.stderr:
        lacking("strace may not trace here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    killed = [one for one in found if one[3]]
    assert len(killed) >= (40 if count > 40 else 10), f"only {len(killed)} of {len(found)} were killed"
    for force, call, number, _, state, aside, after, untouched in found:
        where = f"{'--force, ' if force else ''}killed at {call} {number}"
        assert state in (("old", "new") if force else ("none", "new")) or (state == "none" and aside), (
            f"{where}: {state}"
        )
        assert after, where
        assert untouched, where
    assert {one[1] for one in killed} >= {"openat", "write", "fsync", "link"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        lacking("a small disk cannot be mounted here (that needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(tmp_path / "base", "BF16")
    size = sum(path.stat().st_size for path in base.iterdir())
    (small_disk / "other").write_bytes(bytes(200 * 1024 - size + 20_000))
    with pytest.raises(LoraStackError, match="nothing was written"):
        merge(base, adapters(), small_disk / "out")
    # Where the room goes only while it writes, the system says so.
    monkeypatch.setattr("lorastack.merging.new_base._check_room", lambda out, size: None)
    with pytest.raises(LoraStackError, match="nothing was changed: No space left on device"):
        merge(base, adapters(), small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_an_output_that_cannot_be_written_is_said(small_disk: Path, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", "BF16")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LoraStackError, match="could not be written, nothing was changed: Read-only file system"):
        merge(base, adapters(), small_disk / "out")
    assert not any(small_disk.iterdir())


def test_two_runs_into_one_output_give_one_of_the_two(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", "BF16")
    code = (
        "import sys; from pathlib import Path; from lorastack import merge\n"
        "from tests.merge.stacks import adapters\n"
        "merge(Path(sys.argv[1]), adapters(int(sys.argv[2])), Path(sys.argv[3]))"
    )
    root = Path(__file__).parents[2]
    env = dict(os.environ, PYTHONPATH=f"{root}:{os.environ.get('PYTHONPATH', '')}")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(base), str(count), str(tmp_path / "out")],
            cwd=root, env=env, stderr=subprocess.PIPE, text=True,
        )
        for count in (1, 2)
    ]  # fmt: skip
    ends = [(one.communicate()[1], one.returncode) for one in running]
    assert sorted(code for _, code in ends) == [0, 1], ends
    assert any("exists" in said for said, code in ends if code)
    winner = 1 + [code for _, code in ends].index(0)
    merge(base, adapters(winner), tmp_path / "alone")
    new, alone = everything(tmp_path / "out"), everything(tmp_path / "alone")
    assert all((new[key] == alone[key]).all() for key in alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "base", "out"]
