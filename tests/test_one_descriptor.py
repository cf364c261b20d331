"""What was checked is what is read: a file that is replaced, overwritten or cut short gives no other numbers."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorastack import LoadedLora, LoraStack, load, save
from lorastack.base import open_base
from lorastack.errors import FormatError
from lorastack.formats import opened
from lorastack.formats.opened import OpenedFile
from lorastack.formats.provenance import Provenance, hashes

W = "blk.0.attn_q.weight"


def write_peft_by_hand(folder: Path, value: float) -> None:
    """A PEFT folder of one module, q, without our own writer."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    key = "base_model.model.q.lora_{}.weight"
    tensors = {key.format("A"): np.full((2, 6), value, np.float32), key.format("B"): np.ones((4, 2), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")


def lora(value: float, rows: int = 4, weight: str = W) -> LoadedLora:
    a, b = np.full((2, 6), value, np.float32), np.full((rows, 2), 1, np.float32)
    return LoadedLora.from_tensors({weight: (a, b)}, alpha=4, name="x")


def write(path: Path, value: float, rows: int = 4) -> Path:
    """An adapter in the format that the path's ending says; returns its file of weights."""
    one = lora(value, rows, W if path.suffix else "layers.0.q_proj.weight")
    save(one, path, recipe=False, force=True, architecture="llama" if path.suffix else None)
    return path if path.suffix else path / "adapter_model.safetensors"


@pytest.fixture(params=[".gguf", ""], ids=["gguf", "peft"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"adapter{request.param}"


def numbers(one: LoadedLora) -> set[float]:
    (delta,) = one.adapters.values()
    return {float(x) for x in np.unique(delta.a)}


def outcome(one: LoadedLora) -> str:
    """``old``: the numbers that were there when it was opened; ``refused``: by our word for it; or else."""
    try:
        found = numbers(one)
    except FormatError as error:
        said = str(error)
        return "refused" if "it was changed or replaced since it was opened; load it again" in said else said
    return "old" if found == {1.0} else f"read {found}"


def test_a_file_that_was_replaced_gives_the_numbers_that_were_there(path: Path, tmp_path: Path) -> None:
    file, other = write(path, 1), write(tmp_path / f"other{path.suffix}", 7, rows=9)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    one = load(path)
    os.replace(other, file)
    assert numbers(one) == {1.0}
    assert hashes(one)[file.name] == before, "the hash is that of the bytes used"


def test_after_its_descriptor_was_closed_a_replaced_file_is_refused(path: Path, tmp_path: Path) -> None:
    file, other = write(path, 1), write(tmp_path / f"other{path.suffix}", 7)
    one = load(path)
    many = [OpenedFile(file) for _ in range(opened.HELD)]
    os.replace(other, file)
    with pytest.raises(FormatError, match="it was changed or replaced since it was opened; load it again"):
        numbers(one)
    with pytest.raises(FormatError, match="it was changed or replaced"):
        Provenance.of_lora(one)
    del many


def overwrite(file: Path, value: float) -> None:
    raw = file.read_bytes()
    changed = raw.replace(np.float32(1).tobytes() * 12, np.float32(value).tobytes() * 12)
    assert changed != raw
    with file.open("r+b") as stream:
        stream.write(changed)


@pytest.mark.parametrize("times_set_back", [False, True])
@pytest.mark.parametrize("wait", [0, 0.02])
def test_a_file_that_was_overwritten_in_place_is_refused(path: Path, times_set_back: bool, wait: float) -> None:
    file = write(path, 1)
    one, was = load(path), file.stat()
    time.sleep(wait)
    overwrite(file, 7)
    if times_set_back:
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(FormatError, match="it was changed or replaced since it was opened"):
        numbers(one)


def test_a_file_just_written_is_told_from_one_written_in_the_same_tick(path: Path) -> None:
    for _ in range(20):
        file = write(path, 1)
        one = load(path)
        overwrite(file, 7)
        assert outcome(one) == "refused"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (os.unlink, "old"),  # it lives on while it is open
        (lambda file: os.truncate(file, 200), "refused"),
        (lambda file: os.truncate(file, 0), "refused"),
    ],
    ids=["gone", "cut short", "emptied"],
)
def test_a_file_that_is_gone_or_cut_short_is_what_it_was_or_refused(
    path: Path, change: Callable[[Path], None], expected: str
) -> None:
    file = write(path, 1)
    one = load(path)
    change(file)
    assert [outcome(one) for _ in range(3)] == [expected] * 3


def test_numbers_in_use_are_not_the_files(path: Path) -> None:
    file = write(path, 1)
    stack = LoraStack([(load(path), 1.0)])
    (name,) = stack.weights
    before = stack.apply(name, np.ones(6, np.float32), 4)
    overwrite(file, np.nan)
    np.testing.assert_array_equal(stack.apply(name, np.ones(6, np.float32), 4), before)
    os.truncate(file, 0)
    np.testing.assert_array_equal(stack.apply(name, np.ones(6, np.float32), 4), before)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) not in maps.read_text(), "no mapping outlives the call"


def test_an_open_gguf_reader_is_copied(tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", 1)
    reader = gguf.GGUFReader(file)
    one = LoadedLora.from_gguf(reader)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    overwrite(file, 7)
    assert numbers(one) == {1.0}
    assert hashes(one) == {"x.gguf": before}
    del reader
    gc.collect()
    if Path("/proc/self/maps").exists():
        assert str(file) not in Path("/proc/self/maps").read_text()


def test_the_source_is_the_file_read(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    write(folder, 1)
    write(tmp_path / "ema", 5)
    os.replace(tmp_path / "ema/adapter_model.safetensors", folder / "ema.safetensors")
    save(LoraStack([(load(folder / "ema.safetensors"), 1.0)]).bake(), tmp_path / "baked")
    recipe = tmp_path / "r.toml"
    recipe.write_text(load(tmp_path / "baked").metadata["lorastack.recipe"])
    assert numbers(load(tmp_path / "baked")) == numbers(load(recipe)) == {5.0}
    assert load(folder / "adapter_model.safetensors").source == folder
    assert load(folder / "ema.safetensors").source == folder / "ema.safetensors"


def test_a_file_named_as_pefts_old_one_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write(tmp_path / "f", 1)
    key = "base_model.model.layers.0.q_proj.lora_{}.weight"
    old = {key.format("A"): torch.full((2, 6), 3.0), key.format("B"): torch.ones(4, 2)}
    torch.save(old, tmp_path / "f/adapter_model.bin")
    assert numbers(load(tmp_path / "f/adapter_model.bin")) == {3.0}
    assert numbers(load(tmp_path / "f")) == {1.0}


def test_a_thousand_adapters_need_few_descriptors(tmp_path: Path) -> None:
    for n in range(300):
        write_peft_by_hand(tmp_path / f"p{n}", value=float(n))
    code = (
        "import resource, sys; from pathlib import Path; from lorastack import load\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "every = [load(path) for path in sorted(Path(sys.argv[1]).iterdir())]\n"
        "assert len(every) == 300\n"
        "for one in every: assert one.adapters['q.weight'].a[0, 0] == float(one.name[1:]), one.name\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_where_no_descriptor_is_left_those_held_are_given_up(tmp_path: Path) -> None:
    write_peft_by_hand(tmp_path / "p", value=3.0)
    held = [OpenedFile(tmp_path / "p/adapter_config.json") for _ in range(20)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("needs /proc")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used - 2, hard))
        assert numbers(load(tmp_path / "p")) == {3.0}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert held[0].read(0, 1) == b"{"


def test_a_path_that_was_relative_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft_by_hand(tmp_path / "p", value=3.0)
    monkeypatch.chdir(tmp_path)
    one = load("p")
    many = [OpenedFile("p/adapter_config.json") for _ in range(opened.HELD)]
    monkeypatch.chdir("/")
    assert numbers(one) == {3.0}
    del many


def test_a_base_that_was_changed_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", 1)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_tensor(W, np.ones((4, 6), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base(tmp_path / "base.gguf")
    np.testing.assert_array_equal(base.weight(W), 1)
    time.sleep(0.02)
    with (tmp_path / "base.gguf").open("r+b") as stream:
        stream.write(b"GGUF")
    with pytest.raises(FormatError, match="it was changed or replaced since it was opened"):
        base.weight(W)
    assert file.exists()


@pytest.mark.parametrize("make", ["pipe", "device", "socket", "/proc/self/mem"])
def test_what_is_no_regular_file_is_refused_at_once(make: str, tmp_path: Path) -> None:
    import socket

    where, said = tmp_path / "x.gguf", f"it is a {make}, expected a file"
    if make == "pipe":
        os.mkfifo(where)
    elif make == "device":
        where.symlink_to("/dev/zero")
    elif make == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(where))
        said = "it cannot be read|it is a socket, expected a file"
    else:
        where, said = Path(make), "it is empty"
    began = time.monotonic()
    with pytest.raises(FormatError, match=said):
        load(where)
    assert time.monotonic() - began < 5
