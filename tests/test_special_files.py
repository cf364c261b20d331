"""Pipes, sockets and devices as inputs and outputs of every command: refused at once, by name, and left as they are."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, save
from lorastack.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
LINKS = {"null": "/dev/null", "full": "/dev/full", "zero": "/dev/zero", "random": "/dev/urandom"}


def device(path: Path, kind: int, major: int, minor: int) -> None:
    try:
        os.mknod(path, kind | 0o666, os.makedev(major, minor))
    except PermissionError:
        pytest.skip("only root may make a device")


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a hundred bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


MAKE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pipe": ("a pipe", os.mkfifo),
    "socket": ("a socket", listening),
    "zeros": ("a device", lambda path: device(path, stat.S_IFCHR, 1, 5)),
    "full": ("a device", lambda path: device(path, stat.S_IFCHR, 1, 7)),
    "disk": ("a device", lambda path: device(path, stat.S_IFBLK, 7, 250)),
} | {f"link to {name}": ("a device", lambda path, to=to: path.symlink_to(to)) for name, to in LINKS.items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an adapter ``a``, a base's folder and inputs; whoever waits for a pipe is woken."""
    monkeypatch.chdir(tmp_path)
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    save(LoadedLora.from_tensors({WEIGHT: pair}, name="x", naming="hf"), tmp_path / "a")
    np.save(tmp_path / "x.npy", np.ones(6, np.float32))

    def late(*_: object) -> None:
        raise TimeoutError("it waits for something that never comes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lorastack", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, ""), (words, err)
    return err


#: Input by input: the name that stands in the way, and the command that reads it.
INPUTS: dict[str, tuple[str, list[str]]] = {
    "gguf": ("in.gguf", ["bake", "in.gguf:0.5", "-o", "out.gguf"]),
    "inspected": ("in.gguf", ["inspect", "in.gguf"]),
    "recipe": ("in.toml", ["bake", "in.toml", "-o", "out"]),
    "weights": ("b/adapter_model.safetensors", ["bake", "b", "-o", "out"]),
    "pickle": ("c/adapter_model.bin", ["inspect", "c"]),
    "config": ("b/adapter_config.json", ["compare", "a", "b"]),
    "base": ("base/config.json", ["bake", "a", "-o", "out", "--base", "base"]),
    "base's weights": ("base/model.safetensors", ["inspect", "a", "--base", "base"]),
    "array": ("in.npy", ["apply", "a", "--tensor", WEIGHT, "--input", "in.npy", "-o", "out.npy"]),
}


@pytest.mark.parametrize("kind", MAKE)
def test_no_command_reads_it(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, make = MAKE[kind]
    for name, words in INPUTS.values():
        for folder in ("b", "c", "base"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree("a", "b")
        Path("c").mkdir()
        shutil.copy("a/adapter_config.json", "c")
        Path("base").mkdir()
        if "config" not in name:
            Path("base/config.json").write_text('{"model_type": "llama", "hidden_size": 6}')
        Path(name).unlink(missing_ok=True)
        make(Path(name))
        before = os.lstat(name)
        error = refused(words, monkeypatch, capsys)
        # A folder's weights are looked for among its files. A socket cannot even be opened, and the system says so.
        known = (f"it is {said}", "neither adapter_model.safetensors nor", "without their adapter_config.json",
                 "it has no .safetensors file",
                 f"{name}: it cannot be read: No such device")  # fmt: skip
        assert any(one in error for one in known), (words, error)
        assert os.lstat(name).st_ino == before.st_ino
        Path(name).unlink()
        assert not [path for path in os.listdir() if path.startswith(("out", "."))]


OUTPUTS: dict[str, list[str]] = {
    "bake": ["bake", "a:0.5", "-o", "OUT"],
    "bake gguf": ["bake", "a:0.5", "-o", "OUT.gguf"],
    "resize": ["resize", "a", "--rank", "1", "-o", "OUT"],
    "apply": ["apply", "a", "--tensor", WEIGHT, "--input", "x.npy", "-o", "OUT.npy"],
    "report": ["report", "a", "-o", "OUT.html"],
}


@pytest.mark.parametrize("kind", MAKE)
def test_no_command_replaces_it(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, make = MAKE[kind]
    for words in OUTPUTS.values():
        name = words[words.index("-o") + 1]
        make(Path(name))
        before = os.lstat(name)
        assert f"{name} exists" in refused(words, monkeypatch, capsys)
        assert f"{name} is {said}, and is not replaced" in refused([*words, "--force"], monkeypatch, capsys)
        assert (os.lstat(name).st_ino, os.lstat(name).st_mode) == (before.st_ino, before.st_mode)
        Path(name).unlink()
        assert sorted(os.listdir()) == ["a", "x.npy"]


@pytest.mark.parametrize("inside", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "zeros", "link to null"])
def test_no_command_replaces_a_folder_that_has_one_inside(
    kind: str, inside: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("a", "old")
    (place / "old" / inside).unlink()
    MAKE[kind][1](place / "old" / inside)
    before = os.lstat(place / "old" / inside)
    error = refused(["bake", "a:0.5", "-o", "old", "--force"], monkeypatch, capsys)
    assert "is not replaced" in error
    assert os.lstat(place / "old" / inside).st_ino == before.st_ino


@pytest.mark.parametrize("output", ["/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/comm"])
def test_the_system_s_own_are_not_replaced(
    output: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.lstat(output).st_mode
    for words in [words for how, words in OUTPUTS.items() if how != "report"]:  # which wants a name that ends in .html
        given = [*words[: words.index("-o") + 1], output, *words[words.index("-o") + 2 :]]
        assert "is not replaced" in refused([*given, "--force"], monkeypatch, capsys)
    assert os.lstat(output).st_mode == before
