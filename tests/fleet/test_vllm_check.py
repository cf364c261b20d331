"""The command says which adapters can be served and why others cannot, and a line that keeps other plugins."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import lorastack
from lorastack import LoadedLora
from lorastack.cli.application import app
from lorastack.fleet import vllm_check
from tests.fleet.makers import library

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = library(tmp_path / "loras", count=2, rank=12)
    bad = {NAME: (np.full((4, 64), np.inf, np.float32), np.ones((64, 4), np.float32))}
    LoadedLora.from_tensors(bad, naming="hf", allow_nonfinite=True).save(folder / "inf")
    LoadedLora.from_tensors({NAME: (np.ones((4, 5)), np.ones((64, 4)))}, naming="hf").save(folder / "narrow")
    return folder


def test_every_adapter_is_judged_and_the_command_is_whole(demo: Path, loras: Path) -> None:
    words = ["vllm-check", str(demo / "base"), "--library", str(loras), "--json", "--slots", "4"]
    done = CliRunner().invoke(app, words)
    said = json.loads(done.stdout)
    assert {one["name"]: one["rank"] for one in said["adapters"]} == {"a0": 12, "a1": 12, "inf": None, "narrow": None}
    problems = {one["name"]: one["problem"] for one in said["adapters"]}
    assert "are NaN or Inf" in problems["inf"]
    assert "does not fit base" in problems["narrow"]
    assert (said["rank"], said["max_lora_rank"], said["plugins"]) == (24, 32, None)
    line = shlex.split(said["command"])
    assert {f"LORASTACK_LIBRARY={loras}", "LORASTACK_MAX_RANK=32", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"} < set(line)
    after = line[line.index("vllm") :]
    assert after[:3] == ["vllm", "serve", str(demo / "base")]
    assert after[after.index("--max-lora-rank") + 1] == "32"
    assert after[after.index("--max-loras") + 1] == "4"
    assert after[after.index("--api-server-count") + 1] == "1"
    text = CliRunner().invoke(app, [word for word in words if word != "--json"]).output
    assert "narrow cannot be served" in text
    assert said["command"] in text


def test_other_plugins_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def __init__(self, name: str) -> None:
            self.name = name

    there = {"vllm.general_plugins": ["lorastack", "mine"], "vllm.stat_logger_plugins": ["stats"],
             "vllm.endpoint_plugins": ["lorastack_endpoint", "admin"]}  # fmt: skip
    monkeypatch.setattr(vllm_check, "entry_points", lambda group: [Found(name) for name in there.get(group, [])])
    assert vllm_check.plugins({}, endpoint=False) is None
    # An endpoint of somebody else's is not loaded where nobody names it, and is not made to.
    assert vllm_check.plugins({}, endpoint=True) == ["lorastack", "lorastack_endpoint", "mine", "stats"]
    assert vllm_check.plugins({"VLLM_PLUGINS": "admin,mine"}, endpoint=False) == ["lorastack", "admin", "mine"]
    assert vllm_check.plugins({"VLLM_PLUGINS": ""}, endpoint=False) == ["lorastack"]


def test_a_library_of_which_nothing_can_be_served_is_an_error(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [sys.executable, "-m", "lorastack", "vllm-check", str(demo / "base"), "--library", str(tmp_path / "empty")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no adapter in" in done.stderr


def test_the_plugin_is_inert_and_light_without_a_library() -> None:
    code = (
        "import sys; from lorastack.fleet.vllm_plugin import register; "
        "from lorastack.fleet.vllm_endpoint import MixturesEndpoint; "
        "register(); MixturesEndpoint().attach_router(None); "
        "print([m for m in ('numpy', 'gguf', 'torch', 'vllm', 'fastapi', 'lorastack.errors') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(lorastack.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_settings_without_meaning_stop_the_plugin_with_all_of_them() -> None:
    from lorastack.errors import ArgumentError
    from lorastack.fleet.settings import Settings

    said = {"LORASTACK_LIBRARY": "/nowhere", "LORASTACK_MAX_RANK": "many", "LORASTACK_TOLERANCE": "nan",
            "LORASTACK_CACHE_BYTES": "-1", "LORASTACK_UNIFORM": "yes", "LORASTACK_MAX_MIXTURES": "0"}  # fmt: skip
    with pytest.raises(ArgumentError) as caught:
        Settings.of(said)
    assert len(caught.value.problems) == 6
    assert all(name in str(caught.value) for name in said)
