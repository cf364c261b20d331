"""Files that are something else than they are called, files in parts, and files beside an adapter's own."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from lorastack import LoadedLora, load
from lorastack.base import open_base
from lorastack.errors import FormatError, LoraStackWarning
from lorastack.formats.provenance import hashes
from lorastack.inspect import inspect

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

WEIGHTS, OLD, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bloom": (bloom, ["query_key_value"]),
    "t5": (t5, ["q", "wo"]),
}


@pytest.fixture(params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter as PEFT saves it, in two model families."""
    torch.manual_seed(5)
    make, targets = FAMILIES[request.param]
    model = get_peft_model(make(), LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def check_same(got: LoadedLora, expected: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    assert set(got.adapters) == set(expected)
    for name, factors in expected.items():
        for one, other in zip(got.adapters[name].factors, factors, strict=True):
            np.testing.assert_array_equal(one.array, other)


def factors_of(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors by weight, straight from the file that PEFT wrote."""
    state = load_file(folder / WEIGHTS)
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): (
            value.numpy(),
            state[key.replace("lora_A", "lora_B")].numpy(),
        )
        for key, value in state.items()
        if "lora_A" in key
    }


# ---- heads ----------------------------------------------------------------------------------------


def _tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("adapter_model.safetensors"))
    return data.getvalue()


def _npz() -> bytes:
    data = io.BytesIO()
    np.savez(data, a=np.ones(3))
    return data.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 6832600\n"
HEADS = {
    "LFS pointer": (POINTER, "it is a Git LFS pointer, not the file itself; run: git lfs pull"),
    "Xet pointer": (b"# xet version 0\nfilesize = 3\nhash = 'ab'\n", "it is a Xet pointer"),
    "HTML": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page saved in place of the file"),
    "HTML after a mark": (b"\xef\xbb\xbf \n<HTML><body>", "it is a web page"),
    "an answer of a server": (b"Invalid username or password.", "it is a text that begins 'Invalid username"),
    "ggla": (b"algg" + bytes(100), "it is an adapter (ggla) of llama.cpp before GGUF"),
    "ggjt": (b"tjgg" + bytes(100), "it is a file of llama.cpp before GGUF"),
    "ggml": (b"lmgg" + bytes(100), "convert_lora_to_gguf.py"),
    "npz": (_npz(), "it is a NumPy archive (.npz)"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "it is a NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "it is an HDF5 file"),
    "gzip": (gzip.compress(b"x" * 100), "it is packed with gzip; unpack it first"),
    "tar": (_tar(), "it is a tar archive; unpack it first"),
    "nothing": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", [WEIGHTS, OLD, CONFIG, "alone.gguf", "alone.safetensors", "alone.bin"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    data, said = HEADS[kind]
    if not name.startswith("alone") and name != CONFIG:
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path / name, *([tmp_path] if not name.startswith("alone") else [])):
        with pytest.raises(FormatError) as caught:
            load(path)
        wanted = "it is no JSON" if name == CONFIG and "text" in said else said
        assert f"{tmp_path / name}: " in str(caught.value)
        assert wanted in str(caught.value)
        assert "weights_only=False" not in str(caught.value)
        assert "torch." not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "alone.gguf"])
@pytest.mark.parametrize("kind", ["LFS pointer", "HTML"])
def test_so_is_a_file_of_a_base(tmp_path: Path, kind: str, name: str) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    data, said = HEADS[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError) as caught:
        open_base(tmp_path / name if name.endswith(".gguf") else tmp_path)
    assert said in str(caught.value)


def test_a_safetensors_header_may_look_like_a_pickle(plain: Path) -> None:
    """Its length is the first thing in the file, and a pickle's mark is a number too."""
    length = 0x380
    (plain / WEIGHTS).rename(plain / "other.safetensors")
    raw = (plain / "other.safetensors").read_bytes()
    header = json.dumps(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])).encode()
    while length < len(header):
        length += 1 << 16
    data = length.to_bytes(8, "little") + header.ljust(length) + raw[8 + int.from_bytes(raw[:8], "little") :]
    assert data[:2] == b"\x80\x03"
    for name in ("other.safetensors", "other.weights"):
        (plain / name).write_bytes(data)
        assert load(plain / name).rank == 3


class _Asks:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.path.join, ("a", "b")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps({"a": _Asks()}, protocol=2), "it asks to run posixpath.join, which is no part of a state dict"),
        (pickle.dumps(list(range(300)), protocol=2)[:-3], "or is damaged or cut short"),
        (b"PK\x03\x04" + bytes(200), "or is damaged or cut short"),
    ],
)
def test_of_what_torch_refuses_our_words_are_said(plain: Path, data: bytes, said: str) -> None:
    (plain / WEIGHTS).unlink()
    (plain / OLD).write_bytes(data)
    with pytest.raises(FormatError) as caught:
        load(plain)
    assert said in str(caught.value)
    for advice in ("weights_only=False", "safe_globals", "allowlist", "trust", "Re-run"):
        assert advice not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# ---- adapters of other programs -------------------------------------------------------------------

OTHERS = {
    "unet:0:up": "a cloneofsimo adapter",
    "controlnet.down_blocks.0.attn1.to_q.lora_A.weight": "an adapter of a ControlNet or VAE",
    "double_blocks.0.processor.qkv_lora1.down.weight": "an XLabs (Flux) adapter",
    "transformer.h.0.attn.c_attn.lora_A.weight": f"PEFT weights without their {CONFIG}",
    "transformer.layer.0.attention.q_lin.lora_A.default.weight": f"PEFT weights without their {CONFIG}",
    "base_model.model.unet.mid_block.to_q.lora_A.weight": f"PEFT weights without their {CONFIG}",
    "_orig_mod.base_model.model.transformer.h.0.mlp.lora_A.weight": f"PEFT weights without their {CONFIG}",
    "model.layers.0.q_proj.lora_a": f"an MLX adapter without its {CONFIG}",
    "transformer.h.0.mlp.c_fc.weight": "no LoRA adapter",
}


@pytest.mark.parametrize("key", OTHERS)
def test_an_adapter_of_another_program_is_called_what_it_is(tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "one.safetensors")
    for path in (tmp_path, tmp_path / "one.safetensors"):
        with pytest.raises(FormatError) as caught:
            load(path)
        assert f"it is {OTHERS[key]}" in str(caught.value)


def test_a_fused_adapter_of_the_first_peft_is_called_so_whatever_is_ignored(plain: Path) -> None:
    config = json.loads((plain / CONFIG).read_text())
    (plain / CONFIG).write_text(json.dumps(config | {"enable_lora": [True, False, True], "merge_weights": False}))
    for ignore in ((), ("enable_lora",)):
        with pytest.raises(FormatError) as caught:
            load(plain, ignore=ignore)
        assert "loralib's MergedLinear" in str(caught.value)
        assert "ignore" not in str(caught.value)
        assert len(caught.value.problems) == 1
    (plain / CONFIG).write_text(json.dumps(config | {"enable_lora": None, "merge_weights": True}))
    check_same(load(plain), factors_of(plain))


# ---- shards ---------------------------------------------------------------------------------------


def sharded(plain: Path, folder: Path, ending: str, stem: str = "adapter_model") -> dict[str, str]:
    """The adapter in two shards with an index, as transformers names them; returns the index's map."""
    folder.mkdir()
    (folder / CONFIG).write_bytes((plain / CONFIG).read_bytes())
    state = load_file(plain / WEIGHTS)
    where = {key: f"{stem}-0000{1 + n % 2}-of-00002.{ending}" for n, key in enumerate(sorted(state))}
    for name in set(where.values()):
        part = {key: state[key] for key, holder in where.items() if holder == name}
        torch.save(part, folder / name) if ending == "bin" else save_file(part, folder / name)
    index(folder, ending, where, stem)
    return where


def index(folder: Path, ending: str, where: Any, stem: str = "adapter_model") -> None:
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("stem", ["adapter_model", "model", "pytorch_model"])
def test_shards_with_their_index_are_one_adapter(plain: Path, tmp_path: Path, ending: str, stem: str) -> None:
    if (stem, ending) in (("model", "bin"), ("pytorch_model", "safetensors")):
        pytest.skip("nobody names them so")
    folder = tmp_path / "parts"
    where = sharded(plain, folder, ending, stem)
    lora = load(folder)
    check_same(lora, factors_of(plain))
    assert lora.name == "parts"
    names = {CONFIG, f"{stem}.{ending}.index.json", *where.values()}
    assert {path.name for path in lora.files} == set(hashes(lora)) == names
    assert inspect(lora).size == sum((folder / name).stat().st_size for name in names)
    check_same(load(folder / f"{stem}.{ending}.index.json"), factors_of(plain))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_shard_alone_is_refused(plain: Path, tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "parts"
    first = min(sharded(plain, folder, ending).values())
    with pytest.raises(FormatError, match=rf"{first}: it is part 1 of 2 of an adapter.*give the folder {folder}"):
        load(folder / first)
    (folder / f"adapter_model.{ending}.index.json").unlink()
    with pytest.raises(FormatError, match=r"it is part 1 of 2 .*fetch all parts with adapter_model\.\w+\.index\.json"):
        load(folder / first)
    with pytest.raises(FormatError, match=f"it has shards such as {first}, but no"):
        load(folder)


def test_what_shards_and_index_disagree_on_is_all_listed(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    where = sharded(plain, folder, "safetensors")
    first, second = sorted(set(where.values()))
    (folder / second).unlink()
    lost = next(key for key, name in where.items() if name == first)
    index(folder, "safetensors", {**{key: name for key, name in where.items() if key != lost}, "stray": first})
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert [line.split(";")[0] for line in caught.value.problems] == [
        f"{second} is not there",
        f"{first} lacks 1 tensors such as stray",
        f"{first} has, without a word in the index, 1 tensors such as {lost}",
    ]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "c:x", "a\\b"])
def test_an_index_that_leads_out_of_its_folder_is_refused(plain: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "parts"
    where = sharded(plain, folder, "safetensors")
    index(folder, "safetensors", where | {"stray": name})
    with pytest.raises(FormatError, match="it names files outside its folder") as caught:
        load(folder)
    assert caught.value.problems == (repr(name),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[]", "it is no JSON object"),
        ("{}", "weight_map is None, expected tensor names with file names"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": {"a": 1}}', "weight_map is {'a': 1}"),
        (POINTER.decode(), "it is a Git LFS pointer"),
    ],
)
def test_an_index_that_is_none_is_refused(plain: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = tmp_path / "parts"
    sharded(plain, folder, "safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert said in str(caught.value)


# ---- folders --------------------------------------------------------------------------------------


def test_the_only_adapter_below_a_folder_is_loaded(plain: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    (outer / "checkpoint-7").mkdir(parents=True)
    plain.rename(outer / "checkpoint-7" / "style")
    lora = load(outer)
    assert lora.name == "style"
    check_same(lora, factors_of(outer / "checkpoint-7" / "style"))
    assert load(outer, name="mine").name == "mine"
    (outer / "config.json").write_text("{}")
    assert load(outer).name == "style"
    save_file({"w": torch.ones(1)}, outer / "model.safetensors")
    with pytest.raises(FormatError, match="it holds a whole model, and an adapter below it") as caught:
        load(outer)
    assert caught.value.problems == (str(outer / "checkpoint-7" / "style"),)


def test_weights_under_a_name_of_their_own_are_pointed_at_and_read(plain: Path) -> None:
    expected = factors_of(plain)
    torch.save({"state_dict": load_file(plain / WEIGHTS)}, plain / "last.ckpt")
    (plain / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=r"give the file itself if its weights are in last\.ckpt"):
        load(plain)
    check_same(load(plain / "last.ckpt"), expected)


def test_the_size_and_the_hashes_are_those_of_what_was_read(plain: Path) -> None:
    torch.save({}, plain / OLD)
    (plain / "adapter_notes.txt").write_text("x" * 1000)
    lora = load(plain)
    assert set(hashes(lora)) == {CONFIG, WEIGHTS}
    assert inspect(lora).size == sum((plain / name).stat().st_size for name in (CONFIG, WEIGHTS))


# ---- companions -----------------------------------------------------------------------------------

COMPANIONS = {
    "non_lora_trainables.bin": 2,
    "mm_projector.bin": 1,
    "new_embeddings.safetensors": 3,
    "value_head.safetensors": 1,
    "trainable_params.bin": 2,
    "my_audio_projector.pt": 1,
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_file_with_more_of_what_was_trained_is_said(plain: Path, name: str) -> None:
    count = COMPANIONS[name]
    state = {f"w{n}": torch.nn.Parameter(torch.ones(2, 2)) for n in range(count)}
    if name.endswith(".safetensors"):
        save_file({key: value.data for key, value in state.items()}, plain / name)
    else:
        torch.save(state, plain / name)
    said = f"{name} holds {count} further trained tensor{'s' if count > 1 else ''}, which is not read"
    with pytest.warns(LoraStackWarning, match=said) as caught:
        lora = load(plain)
    assert len(caught) == 1
    assert f"ignore=['{name}']" in str(caught[0].message)
    assert said in inspect(lora).odd
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(load(plain, ignore=[name])).odd == []


def test_a_companion_is_counted_without_running_it(plain: Path) -> None:
    (plain / "non_lora_trainables.bin").write_bytes(pickle.dumps(_Asks()))
    with pytest.warns(LoraStackWarning, match=r"holds further trained weights \(\d+ bytes\), which is not read"):
        load(plain)


def test_files_of_training_are_no_companions(plain: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", OLD):
        torch.save({"w": torch.ones(1)}, plain / name)
    (plain / "additional_config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(load(plain)).odd == []


def test_the_command_says_a_warning_plainly(plain: Path) -> None:
    torch.save({"w": torch.ones(1)}, plain / "mm_projector.bin")
    run = [sys.executable, "-c", "from lorastack.cli import main; main()"]
    for command, warned in (("resize", True), ("inspect", False)):
        more = ["--rank", "2", "-o", str(plain.parent / "small")] if command == "resize" else []
        done = subprocess.run([*run, command, str(plain), *more], capture_output=True, text=True, check=True)
        assert done.stderr.startswith("warning: ") == warned
        assert ("mm_projector.bin holds 1 further trained tensor" in done.stderr) == warned
        assert ("mm_projector.bin holds 1 further trained tensor" in done.stdout) != warned
        assert "LoraStackWarning" not in done.stderr
