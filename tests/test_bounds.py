"""What a file may cost: memory and time in proportion to its size, whatever it holds."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load, save
from lorastack.core.target import place_of
from lorastack.errors import FormatError, LoraStackError
from lorastack.formats.limits import MAX_NAME
from tests.hostile.limits import refused

torch = pytest.importorskip("torch")

P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound PEFT folder of one module, q."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    put_header(tmp_path, {"q": 2})
    return tmp_path


def put_header(folder: Path, modules: dict[str, int], raw: bytes | None = None) -> None:
    header: dict[str, Any] = {}
    at = 0
    for module, rank in modules.items():
        for part, shape in (("A", [rank, 6]), ("B", [5, rank])):
            size = 4 * shape[0] * shape[1]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            header[f"{P}{module}.lora_{part}.weight"] = entry
            at += size
    head = json.dumps(header).encode() if raw is None else raw
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(at))


def edit(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    return folder


@pytest.mark.parametrize("item", [b"{},", b'{"":0},', b'{"a":[]},', b"[],", b'"",', b"[[[]]],", b"0,"])
def test_a_header_of_many_small_objects_is_not_parsed(folder: Path, item: bytes) -> None:
    put_header(folder, {}, b'{"x":[' + item * (10_000_000 // len(item)) + item[:-1] + b"]}")
    error = refused(folder)
    assert "MiB of memory to parse" in str(error) or "no known dtype" in str(error)


@pytest.mark.parametrize("item", [b"{},", b"[],"])
def test_a_config_of_many_small_objects_is_not_parsed(folder: Path, item: bytes) -> None:
    many = item * 3_000_000 + item[:-1]
    (folder / "adapter_config.json").write_bytes(b'{"peft_type":"LORA","auto_mapping":[' + many + b"]}")
    assert "MiB of memory to parse" in str(refused(folder))


def test_a_config_of_any_size_is_not_read(folder: Path) -> None:
    os.truncate(folder / "adapter_config.json", 3 << 30)
    assert f"it has {3 << 30} bytes, of JSON at most" in str(refused(folder))


def test_long_names_are_refused(folder: Path) -> None:
    put_header(folder, {"layers.0." * 20_000 + "z": 2})
    assert f"at most {MAX_NAME} are read" in str(refused(folder))
    put_header(folder, {"model.layers." + "1" * 5000 + ".self_attn.q_proj": 2})
    assert f"at most {MAX_NAME} are read" in str(refused(folder))


@pytest.mark.parametrize("digits", [1, 9, 10, 900])
def test_the_place_of_a_weight_is_found_whatever_its_number(digits: int) -> None:
    for name in (f"model.layers.{'1' * digits}.self_attn.q_proj.weight", f"blk.{'1' * digits}.attn_q.weight"):
        place = place_of(name)
        assert (place is not None and place[1] == int("1" * digits)) == (digits < 10)


def test_a_place_is_found_in_linear_time() -> None:
    began = time.process_time()
    assert place_of("layers.0." * 50_000 + "q_proj") is None
    assert place_of("layers.0." * 50_000 + "q_proj.weight") is not None
    assert time.process_time() - began < 1


def test_our_own_files_load_in_linear_time(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        names = [f"model.layers.{k // 64}.mlp.experts.{k % 64}.up_proj.weight" for k in range(count)]
        ranks = [1 + k % 3 for k in range(count)]
        made = {n: (np.ones((r, 4), "f4"), np.ones((4, r), "f4")) for n, r in zip(names, ranks, strict=True)}
        one = LoadedLora.from_tensors(made, naming="hf", alpha=3)
        save(one, tmp_path / str(count), recipe=False)
        began = time.process_time()
        again = load(tmp_path / str(count))
        took = time.process_time() - began
        assert [d.scaling for d in again.adapters.values()] == [d.scaling for d in one.adapters.values()]
        return took

    few, many = seconds(2000), seconds(8000)
    assert many < min(5, 16 * max(few, 0.05)), "four times as many; quadratic is sixteen times as long"


@pytest.mark.parametrize(
    ("field", "key", "module"),
    [
        ("rank_pattern", "(a+)+b", "a" * 40 + "!"),
        ("alpha_pattern", "(a|a)*b", "a" * 40 + "!"),
        ("alpha_pattern", "(.*.*)*=", "model.layers.0.self_attn.q_proj"),
        ("rank_pattern", r"(?=(a+)+b)\1", "a" * 40 + "!"),
    ],
)
def test_no_pattern_keeps_it_busy(folder: Path, field: str, key: str, module: str) -> None:
    put_header(folder, {module: 2})
    edit(folder, **{field: {key: 4}})
    began = time.process_time()
    try:
        load(folder)
    except LoraStackError as error:
        assert "patterns take more than" in str(error)  # noqa: PT017
    assert time.process_time() - began < 6


ODD: dict[str, list[Any]] = {
    "base_model_name_or_path": [5, ["a"], {"a": 1}],
    "modules_to_save": [5, "head", [1]],
    "alora_invocation_tokens": [5, [-1], [1 << 40], ["a"], [True], {"a": 1}],
    "trainable_token_indices": [5, ["a"], {"q": 5}],
    "target_parameters": [5, "x", [None]],
    "use_rslora": ["false", [1]],
    "use_dora": ["no"],
    "lora_bias": [{"a": 1}],
    "bias": [5, ["all"]],
    "revision": [5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in ODD.items() for value in values], ids=str
)
def test_a_field_of_another_kind_is_refused_by_its_name(folder: Path, field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"{field} is .*, expected .*; correct the config"):
        load(edit(folder, **{field: value}))


def test_no_field_of_the_config_breaks_anything_later(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    values = [5, -1, 1e308, "x", "", [], [5], ["x"], {}, {"x": 5}, {"5": []}, True, None, [[["x"]]], 1 << 63]
    out = tmp_path_factory.mktemp("out")
    fields = [*ODD, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "auto_mapping",
              "task_type", "fan_in_fan_out", "peft_type", "layers_to_transform", "enable_lora", "unknown"]  # fmt: skip
    loaded = 0
    for field in fields:
        for n, value in enumerate(values):
            edit(folder, **{field: value})
            try:
                one = load(folder)
                one.save(out / f"{field}{n}")
                assert load(out / f"{field}{n}").adapters["q.weight"].a.shape == (2, 6)
                LoraStack([(one, 0.5)]).bake().save(out / f"baked-{field}{n}")
                loaded += 1
            except LoraStackError:
                pass
    assert loaded > 50


# ---- what torch.save wrote ------------------------------------------------------------------------


def archive(folder: Path, pickled: bytes, more: dict[str, bytes] | None = None) -> Path:
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as parts:
        parts.writestr("a/data.pkl", pickled)
        for name, data in {"a/version": b"3\n", "a/byteorder": b"little", **(more or {})}.items():
            parts.writestr(name, data)
    return folder


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


PICKLES = {
    "bytearray of 3 GB": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (3 << 30).to_bytes(5, "little") + b"\x85R.",
                          "it asks to run builtins.bytearray"),
    "set": (b"\x80\x02cbuiltins\nset\n]\x85R.", "it asks to run builtins.set"),
    "numbers of one hash": (
        b"\x80\x02}(" + b"".join(number((2**61 - 1) * n) + b"N" for n in range(1, 3000)) + b"u.",
        "keys that are neither texts nor small numbers",
    ),
    "tuples as keys": (b"\x80\x02}(" + b"K\x01K\x02\x86N" * 100 + b"u.", "keys that are neither texts nor small"),
    "a tuple as the key of one": (b"\x80\x02}K\x01K\x02\x86Ns.", "keys that are neither texts nor small"),
    "tuples in a dict made at once": (b"\x80\x02(K\x01K\x02\x86Nd.", "keys that are neither texts nor small"),
    "an ordered dict that is filled at once": (
        b"\x80\x02ccollections\nOrderedDict\n]" + number(2**61 - 1) + b"N\x86a\x85R.", "fills a dict in a way"),
    "a state for no dict": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R}b.", "a state of its own"),
    "lists without end": (b"\x80\x02(" + b"]" * 2_000_000 + b"l.", "far more objects than a state dict"),
    "a stack that is empty": (b"\x80\x02R.", "damaged or cut short"),
    "a mark that is not there": (b"\x80\x02u.", "damaged or cut short"),
    "a memo that is not there": (b"\x80\x02h\x05.", "damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_looked_through_before_torch_sees_it(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled, said = PICKLES[name]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    began = time.process_time()
    with pytest.raises(FormatError) as caught:
        load(archive(folder, pickled))
    assert said in str(caught.value)
    assert time.process_time() - began < 5


def test_an_old_file_without_an_archive_is_looked_through_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {P + "q.lora_A.weight": torch.full((2, 6), 3.0), P + "q.lora_B.weight": torch.ones(5, 2)}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert float(load(folder).adapters["q.weight"].a[0, 0]) == 3.0
    raw = (folder / "adapter_model.bin").read_bytes()
    at = raw.index(b"}q\x00", 60)  # the state dict, behind three small pickles
    (folder / "adapter_model.bin").write_bytes(raw[:at] + b"cbuiltins\nbytearray\n" + raw[at:])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    assert "it asks to run builtins.bytearray" in str(refused(folder))


def test_a_parameter_with_a_state_of_its_own_is_refused(folder: Path) -> None:
    odd = torch.nn.Parameter(torch.ones(2, 6))
    odd.numel = 5  # type: ignore[method-assign]
    (folder / "adapter_model.safetensors").unlink()
    torch.save({P + "q.lora_A.weight": odd, P + "q.lora_B.weight": torch.ones(5, 2)}, folder / "adapter_model.bin")
    assert "it asks to run torch._utils._rebuild_parameter_with_state" in str(refused(folder))


def test_an_archive_with_two_pickles_is_refused(folder: Path) -> None:
    stream = io.BytesIO()
    torch.save({P + "q.lora_A.weight": torch.ones(2, 6)}, stream)
    archive(folder, b"\x80\x02}.", {"b/data.pkl": b"\x80\x02}."})
    assert "not as torch.save writes one" in str(refused(folder))


@pytest.mark.parametrize("make", [lambda t: t, torch.nn.Parameter, lambda t: t.half(), lambda t: t.bfloat16()])
def test_what_torch_saves_is_still_read(folder: Path, make: Any) -> None:
    a, b = make(torch.full((2, 6), 3.0)), make(torch.ones(5, 2))
    state = {P + "q.lora_A.weight": a, P + "q.lora_B.weight": b}
    (folder / "adapter_model.safetensors").unlink()
    inside = {"state_dict": state, "optimizer": {"state": {0: {"step": 5}}, "lr": 0.1}, "epoch": 3}
    for saved in (state, dict(state), inside):
        torch.save(saved, folder / "adapter_model.bin")
        assert float(load(folder).adapters["q.weight"].a[0, 0]) == 3.0


# ---- GGUF -----------------------------------------------------------------------------------------


def test_ten_thousand_gguf_tensors_cost_little(tmp_path: Path) -> None:
    from tests.hostile.gguf_bytes import header, padded, tensor

    names = [f"{n:x}.weight.lora_a" for n in range(10_000)]
    file = tmp_path / "x.gguf"
    file.write_bytes(padded(header(tensors=[tensor(name, [0], 0) for name in names])))
    assert "has no" in str(refused(file))


def test_more_tensors_than_any_adapter_has_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorastack.formats import gguf_header
    from tests.hostile.gguf_bytes import DATA, header, padded

    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 1)
    file = tmp_path / "x.gguf"
    file.write_bytes(padded(header()) + DATA)
    with pytest.raises(FormatError, match="2 tensors, at most 1 are read"):
        load(file)
