"""``lorastack merge`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.test_cli import Command, lorastack  # noqa: F401


def test_it_says_what_it_did_and_the_recipe_makes_it_again(lorastack: Command) -> None:  # noqa: F811
    said = lorastack.works("merge", "base", "luna:0.7", "robot:0.3", "-o", "new", "--verify")
    assert "new: " in said
    assert "28 of 38 tensors changed" in said
    assert "F32: 100.0% of the updates of 28 weights is kept" in said
    assert "verified: 28 weights, the error is at most" in said
    assert "| luna | 0.7 |" in Path("new/README.md").read_text()
    lorastack.works("merge", "base", "new/lorastack_merge.toml", "-o", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("new/model.safetensors").read_bytes()
    one = lorastack.works("inspect", "luna", "--base", "new")
    assert "does not fit" not in one


def test_formats_mix_and_go_to_gguf(lorastack: Command) -> None:  # noqa: F811
    lorastack.works("merge", "base.gguf", "excited.gguf:0.7", "luna:0.3", "-o", "new.gguf")
    lorastack.works("merge", "base", "excited.gguf:0.7", "luna:0.3", "-o", "new")
    import gguf

    name = "blk.0.attn_v.weight"
    found = next(t for t in gguf.GGUFReader("new.gguf").tensors if t.name == name).data
    there = load_file("new/model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    np.testing.assert_allclose(found, there, atol=1e-6)


def test_a_dry_run_writes_nothing_and_warns_of_types_with_few_digits(lorastack: Command) -> None:  # noqa: F811
    before = lorastack.contents()
    said = lorastack.works("merge", "base.gguf", "luna:0.01", "--outtype", "f16", "-o", "new.gguf", "--dry-run")
    assert "new.gguf would have" in said
    assert "F16: " in said
    assert lorastack.contents() == before
    assert "most of the update is lost" not in said
    table = {key: value.astype(np.float16) for key, value in load_file("base/model.safetensors").items()}
    save_file(table, "base/model.safetensors", {"format": "pt"})
    said = lorastack.works("merge", "base", "luna:0.00005", "-o", "new", "--dry-run")
    assert "most of the update is lost to rounding: use the adapters at run time" in said


def test_errors_are_said_with_flags_and_change_nothing(lorastack: Command) -> None:  # noqa: F811
    Path("taken").mkdir()
    assert "taken exists; choose another name, or pass --force" in lorastack.fails(
        "merge", "base", "luna", "-o", "taken"
    )
    assert "holds more than an adapter" in lorastack.fails("merge", "base", "luna", "-o", "base", "--force")
    assert "the base, which is never changed" in lorastack.fails("merge", "base", "luna", "-o", "base/new")
    assert "expected nearest or stochastic" in lorastack.fails("merge", "base", "luna", "-o", "x", "--round", "up")
    assert "--outtype 'q9' is no type" in lorastack.fails(
        "merge", "base.gguf", "luna", "-o", "x.gguf", "--outtype", "q9"
    )
    assert "is no GGUF file" in lorastack.fails("merge", "base", "luna", "-o", "x", "--outtype", "q8_0")
    assert "leave the ending out" in lorastack.fails("merge", "base", "luna", "-o", "x.gguf")
    assert "(Q4_0)" in lorastack.fails("merge", "base.gguf", "luna", "-o", "x.gguf", "--outtype", "q4_0")
    config = json.loads(Path("base/config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq"}}
    Path("base/config.json").write_text(json.dumps(quantised))
    said = lorastack.fails("merge", "base", "luna", "-o", "x")
    assert "merge into the model it was made from, and quantise that, or use the adapters at run time instead" in said


def test_methods_of_bake_are_merged(lorastack: Command) -> None:  # noqa: F811
    said = lorastack.works("merge", "base", "luna", "robot", "--method", "ties@knots", "--rank", "4", "-o", "new")
    assert "28 of 38" in said
    assert 'method = "ties@knots"' in Path("new/lorastack_merge.toml").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    code = """
import sys, numpy as np, ml_dtypes
from pathlib import Path
from safetensors.numpy import save_file
from lorastack import LoadedLora, merge
folder = Path(sys.argv[1])
(folder / "base").mkdir()
(folder / "base/config.json").write_text("{}")
path = folder / "base/model.safetensors"
shape = (65536, 2048)
save_file({"w.weight": np.zeros((4, 4), ml_dtypes.bfloat16)}, folder / "small.safetensors")
import json
raw = json.dumps({"w.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * shape[0] * shape[1]]}}).encode()
with path.open("wb") as file:
    file.write(len(raw).to_bytes(8, "little") + raw)
    file.truncate(8 + len(raw) + 2 * shape[0] * shape[1])
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
lora = LoadedLora.from_tensors({"w.weight": (np.ones((4, 2048), np.float32), np.ones((65536, 4), np.float32))})
before = peak()
merge(folder / "base", lora, folder / "out", verify=True)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, "MiB, for a tensor of 256"
