"""Outputs: what --force replaces and what never, what is kept, and what happens where the system lacks a way."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load, save
from lorastack.errors import ArgumentError, LoraStackError
from lorastack.files import OutputError, check_output, moves, partials, whole_output

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
REFUSED = r"is not replaced|holds more than"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def lora(value: float = 1.0) -> LoadedLora:
    pair = (np.full((2, 6), value, np.float32), np.ones((5, 2), np.float32))
    return LoadedLora.from_tensors({WEIGHT: pair}, name="x", naming="hf")


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(params=["renameat2", "without"])
def moving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's own moves, and on one that lacks them."""
    if request.param == "without":
        monkeypatch.setattr(moves, "_function", lambda: None)
    return request.param


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    for other in ("wedding.jpg", "README.md", "adapter_model.safetensors.bak", "sub/adapter_config.json"):
        folder = save(lora(), tmp_path / other.replace("/", "-"))
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("precious")
        before = listing(tmp_path)
        with pytest.raises(ArgumentError, match=r"holds more than an adapter \('[^']+'\), and is not replaced"):
            save(lora(2), folder, force=True)
        assert listing(tmp_path) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home/adapter_model.bin").write_text("no config")
    with pytest.raises(ArgumentError, match="home holds no whole adapter"):
        save(lora(), tmp_path / "home", force=True)


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("/dev/null")
        for name, kind in (("pipe", "a pipe"), ("socket", "a socket"), ("link", "a device")):
            before = (tmp_path / name).lstat()
            with (
                pytest.raises(ArgumentError, match=f"{name} is {kind}, and is not replaced"),
                whole_output(tmp_path / name, force=True),
            ):
                pytest.fail("the body must not run")
            assert (tmp_path / name).lstat().st_ino == before.st_ino
    for place in ("/dev/stdout", "/dev/null", "/proc/self/comm"):
        with pytest.raises(ArgumentError, match="is not replaced"):
            check_output(Path(place), True)


def test_the_mode_is_kept(tmp_path: Path, moving: str) -> None:
    (tmp_path / "private").write_text("x")
    (tmp_path / "private").chmod(0o600)
    with whole_output(tmp_path / "private", force=True) as path:
        path.write_text("y")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    folder = save(lora(), tmp_path / "a")
    folder.chmod(0o700)
    (folder / "adapter_config.json").chmod(0o640)
    save(lora(2), folder, force=True)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "adapter_config.json")]
    assert modes == [0o700, 0o640]
    assert load(folder).adapters[WEIGHT].a[0, 0] == 2


@pytest.mark.parametrize("how", ["itself", "symlink", "hard link", "folder link", "folder above", "inside"])
def test_a_source_is_never_replaced(tmp_path: Path, how: str) -> None:
    source = save(lora(), tmp_path / "sources" / "a") if (tmp_path / "sources").mkdir() is None else None
    assert source is not None
    target = tmp_path / "out"
    if how == "itself":
        target = source
    elif how == "symlink":
        target.symlink_to(source / "adapter_model.safetensors")
    elif how == "folder link":
        target.symlink_to(source)
    elif how == "hard link":
        os.link(source / "adapter_model.safetensors", target)
    elif how == "inside":
        target = source / "adapter_model.safetensors"
    else:
        target = source.parent
        (target / "adapter_config.json").write_text("{}")
    before = (source / "adapter_model.safetensors").read_bytes()
    made = LoraStack([(load(source), 0.5)]).bake()
    with pytest.raises(ArgumentError, match=REFUSED), whole_output(target, force=True, sources=[source]) as path:
        path.write_text("lost")
    if target.suffix != ".safetensors":
        with pytest.raises(ArgumentError, match=REFUSED):
            save(made, target, force=True)
    assert (source / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path, moving: str, folder: bool, there: str) -> None:
    target = tmp_path / "x"
    with pytest.raises(ArgumentError, match="x exists"), whole_output(target, folder=folder) as path:  # noqa: PT012
        (path / "y" if folder else path).write_text("new")
        if there == "file":
            target.write_text("mine")
        elif there == "folder":
            target.mkdir()
        else:
            target.symlink_to("nowhere")
    assert listing(tmp_path) == {"x"}
    assert target.is_symlink() if there == "link" else (target.is_dir() or target.read_text() == "mine")


@pytest.mark.parametrize("folder", [False, True])
def test_the_move_itself_never_replaces(tmp_path: Path, moving: str, folder: bool) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    new.mkdir() if folder else new.write_text("new")
    there.write_text("mine")
    with pytest.raises(FileExistsError):
        moves.move_new(new, there)
    assert there.read_text() == "mine"
    there.unlink()
    moves.move_new(new, there)
    assert listing(tmp_path) == {"there"}


def test_a_file_system_without_hard_links_has_a_way_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(moves, "_function", lambda: None)
    monkeypatch.setattr(os, "link", refuse)
    with whole_output(tmp_path / "x") as path:
        path.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    with pytest.raises(FileExistsError):
        moves.move_new(save(lora(), tmp_path / "a"), tmp_path / "x")


def test_a_flag_that_the_file_system_does_not_know_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    import errno

    def unknown(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(moves, "_function", lambda: unknown)
    save(lora(), tmp_path / "a")
    save(lora(2), tmp_path / "a", force=True)
    assert load(tmp_path / "a").adapters[WEIGHT].a[0, 0] == 2


def test_what_was_replaced_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lorastack.files")
    (tmp_path / "x").write_text("0123456789")
    with whole_output(tmp_path / "x", force=True) as path:
        path.write_text("y")
    assert [record.getMessage() for record in caplog.records] == [f"replaced {tmp_path}/x (10 bytes)"]


# ---- what dead processes left

HOLDING = """
import os, sys, time
from pathlib import Path
from lorastack.files import whole_output
with whole_output(Path(sys.argv[1])) as path:
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def holder(target: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDING, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def test_a_dead_process_s_folder_is_swept_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    child = holder(tmp_path / "x")
    try:
        check_output(tmp_path / "other", False)
        assert len(list(tmp_path.glob(".x.*.partial"))) == 1
    finally:
        child.kill()
        child.wait()
    assert len(list(tmp_path.glob(".x.*.partial"))) == 1
    check_output(tmp_path / "other", False)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_swept(tmp_path: Path) -> None:
    mine = [".x.abcdefgh.partial/film", "x.abcdefgh.partial/lorastack.lock", ".x.partial/lorastack.lock"]
    for name in mine:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    (tmp_path / ".y.abcdefgh.partial").symlink_to(tmp_path / "x.abcdefgh.partial")
    before = listing(tmp_path)
    check_output(tmp_path / "other", False)
    assert listing(tmp_path) == before


def test_an_old_output_that_stepped_aside_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_function", lambda: None)
    target = save(lora(1), tmp_path / "a")

    class Killed(BaseException):
        pass

    real = os.replace

    def killed(source: Path, to: Path) -> None:
        if Path(to) == target:
            monkeypatch.setattr(partials, "_put_away", lambda folder: None)  # as one that is not there any more
            raise Killed
        real(source, to)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        save(lora(2), target, force=True)
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(ArgumentError, match="a exists"):
        check_output(target, False)
    assert load(target).adapters[WEIGHT].a[0, 0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_that_is_told_to_end_cleans_up(tmp_path: Path, name: str, code: int) -> None:
    program = HOLDING.replace(
        "with whole", "from lorastack.cli.ending import run_to_its_end\ndef work():\n  with whole"
    )
    program = program.replace("\n    path.", "\n      path.").replace("\n    print", "\n      print")
    program = program.replace("\n    time.sleep(60)", "\n      time.sleep(60)\nrun_to_its_end(work)")
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path / "x"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(getattr(signal, name))
    assert child.wait(20) == code
    assert list(tmp_path.iterdir()) == []


def test_when_no_file_can_be_opened_any_more_nothing_is_left(tmp_path: Path) -> None:
    opened = []
    with pytest.raises(OutputError, match="Too many open"), whole_output(tmp_path / "x") as path:  # noqa: PT012
        path.write_text("half")
        try:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            raise OSError(error.errno, error.strerror) from error
    for descriptor in opened:
        os.close(descriptor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "no/x", "file/x"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraStackError), whole_output(tmp_path / name) as path:
        path.write_text("y")
    assert listing(tmp_path) == {"file"}


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 250, "ü" * 120):
        with whole_output(tmp_path / name) as path:
            path.write_text("y")
        assert (tmp_path / name).read_text() == "y"
