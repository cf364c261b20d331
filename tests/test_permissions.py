"""What may not be read or written is an error of ours, also where the tests run as root, who may do everything."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, save

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
WEIGHT = "model.layers.0.self_attn.q_proj.weight"

#: Root becomes nobody when all is imported, since nobody may not read where that lies.
PROGRAM = """
import json, os, sys
from pathlib import Path
from lorastack import LoadedLora, load, save
from lorastack.base import open_base
from lorastack.errors import LoraStackError
from lorastack.files import check_output

folder = Path(sys.argv[1])
made = load(folder / "open")
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
calls = {
    "x.gguf": load, "config": load, "weights": load, "shut": load, "shut/x.gguf": load, "r.toml": load,
    "listed": load, "searched": load, "base": open_base, "shut base": lambda path: open_base(folder / "shut"),
    "shut/": lambda path: save(made, path, force=True), "shut/out": lambda path: save(made, path),
    "kept/out": lambda path: save(made, path), "kept/a": lambda path: save(made, path, force=True),
}
said = {}
for name, call in calls.items():
    try:
        call(folder / name)
        said[name] = "no error"
    except LoraStackError as error:
        said[name] = str(error)
    except BaseException as error:
        said[name] = f"raw: {error!r}"
print(json.dumps(said))
"""


def made() -> LoadedLora:
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    return LoadedLora.from_tensors({WEIGHT: pair}, name="x", naming="hf")


def test_what_may_not_be_read_or_written_is_an_error_of_ours() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        save(made(), folder / "open")
        (folder / "x.gguf").write_bytes(b"GGUF")
        (folder / "r.toml").write_text("[[adapter]]\nsource='open'\n")
        (folder / "base").mkdir()
        (folder / "base/config.json").write_text("{}")
        save(made(), folder / "config"), save(made(), folder / "weights")
        names = "x.gguf r.toml base/config.json config/adapter_config.json weights/adapter_model.safetensors shut"
        shut = [folder / name for name in names.split()]
        (folder / "shut").mkdir()
        (folder / "kept").mkdir()
        save(made(), folder / "kept/a")
        for path in shut:
            path.chmod(0)
        (folder / "kept").chmod(0o555)
        for half, mode in (("listed", 0o444), ("searched", 0o111)):
            save(made(), folder / half)
            (folder / half).chmod(mode)
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=120, check=True
            )
            kept = sorted(path.name for path in (folder / "kept").iterdir())
        finally:
            for path in (*shut, folder / "kept", folder / "listed", folder / "searched"):
                path.chmod(0o755)
    said = json.loads(done.stdout)
    assert len(said) == 14
    for name, words in said.items():
        assert words.lstrip("'").startswith(str(folder)), (name, words)
        assert "Permission denied" in words, (name, words)
    assert "kept/out: could not be written, nothing was changed" in said["kept/out"]
    assert kept == ["a"]
