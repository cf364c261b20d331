"""What inspect says of image adapters: training, trigger words, and the hashes that they are looked up by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorastack import load
from lorastack.cli.application import app
from lorastack.formats.training import training_of
from lorastack.inspect import inspect

TAGS = {"10_zara woman": {"zara woman": 20, "red hat": 7}, "5_style": {" in zara's style": 9, "tree": 9, "sky": 2}}
SAID = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "2",
    "ss_network_alpha": "1.0",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_resolution": "(1024, 1024)",
    "ss_output_name": "zara",
    "ss_tag_frequency": json.dumps(TAGS),
}


def written(path: Path, said: dict[str, str]) -> Path:
    state = {"lora_unet_x.lora_down.weight": torch.ones(2, 7), "lora_unet_x.lora_up.weight": torch.ones(5, 2)}
    save_file(state, path, said)
    return path


def test_what_the_header_says_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "zara.safetensors", SAID)
    found = inspect(load(path))
    assert found.format == "kohya"
    assert found.base == "sdxl_base_v1-0"
    assert found.training["trigger_words"] == ("zara woman", "in zara's style", "tree")
    assert found.training["tags"][0] == ("zara woman", 20)
    assert (found.training["dim"], found.training["alpha"], found.training["resolution"]) == (
        "2",
        "1.0",
        "(1024, 1024)",
    )
    raw = path.read_bytes()
    behind = raw[8 + int.from_bytes(raw[:8], "little") :]
    whole, data = hashlib.sha256(raw).hexdigest(), hashlib.sha256(behind).hexdigest()
    assert found.hashes == {"AutoV2": whole[:10], "AutoV3": data[:12]}


def test_the_command_tells_it_too(tmp_path: Path) -> None:
    path = written(tmp_path / "zara.safetensors", {**SAID, "modelspec.trigger_phrase": "zara\x1b[2J dancing"})
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert done.exit_code == 0, done.output
    for said in ("kohya", "sdxl_base_v1-0", "dancing", "red hat 7", "AutoV2", "AutoV3", "networks.lora"):
        assert said in done.output
    assert "\x1b[2J" not in done.output
    (one,) = json.loads(CliRunner().invoke(app, ["inspect", "--json", str(path)]).output)
    assert one["training"]["tags"][0] == ["zara woman", 20]
    assert set(one["hashes"]) == {"AutoV2", "AutoV3"}


ODD: dict[str, Any] = {
    "no JSON": ("{", "ss_tag_frequency is no JSON object"),
    "a list": ("[1]", "ss_tag_frequency is no JSON object"),
    "objects": ('{"a":' + "[" * 9_000_000, "which is more than is read"),
    "long": ('{"a": {"' + "x" * (1 << 24) + '": 1}}', "which is more than is read"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_damaged_table_of_tags_is_said(tmp_path: Path, case: str) -> None:
    text, said = ODD[case]
    if case in ("long", "objects"):  # which no header of a small file may have
        found = training_of({"ss_tag_frequency": text}).odd
    else:
        found = tuple(inspect(load(written(tmp_path / "x.safetensors", {"ss_tag_frequency": text}))).odd)
    assert len(found) == 1
    assert said in found[0]


def test_strange_counts_are_left_out() -> None:
    table = {"a": {"x": -1, "y": 1.5, "z": True, "w": 3, "v": "4", "u": 10**30}, "b": 4, "1_": {}}
    assert training_of({"ss_tag_frequency": json.dumps(table).replace(str(10**30), "3e30")}).tags == (("w", 3),)


def test_other_adapters_have_neither(tmp_path: Path) -> None:
    found = inspect(load(Path(__file__).parents[1] / "fixtures" / "mlx" / "lora" / "adapter"))
    assert (found.format, found.training, found.hashes, found.base) == ("MLX", {}, {}, "tiny")
