"""``lorastack extract``: what it writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lorastack import load, merge
from tests.extract.models import dense, far
from tests.test_cli import Command, lorastack  # noqa: F401


def tuned(folder: Path) -> None:
    merge("base", load("luna"), "tuned")


def test_the_adapter_comes_back(lorastack: Command) -> None:  # noqa: F811
    tuned(lorastack.folder)
    rank = max(delta.rank for delta in load("luna").adapters.values())
    said = lorastack.works("extract", "tuned", "base", "--rank", rank, "-o", "again")
    assert f"weights of rank {rank}" in said
    assert "relative error" in said
    for name, delta in load("luna").adapters.items():
        assert far(dense(load("again").adapters[name]), dense(delta)) < 1e-3


def test_json_has_the_errors(lorastack: Command) -> None:  # noqa: F811
    tuned(lorastack.folder)
    said = json.loads(lorastack.works("extract", "tuned", "base", "--energy", "0.9", "-o", "again", "--json"))
    assert said["output"] == "again"
    assert 0 < said["error"] <= 0.1**0.5 + 1e-6
    assert set(said["errors"]) == set(said["ranks"]) == set(load("luna").adapters)
    assert (said["rest"], said["added"], said["missing"], said["unsaved"]) == ({}, [], [], [])
    assert lorastack.works("extract", "tuned", "base", "--rank", "2", "-o", "more", "-q") == ""


def test_the_rest_is_said_and_saved(lorastack: Command) -> None:  # noqa: F811
    tuned(lorastack.folder)
    (file,) = lorastack.folder.glob("tuned/*.safetensors")
    tensors = load_file(file)
    norm = tensors["model.norm.weight"]
    save_file({**tensors, "model.norm.weight": np.zeros_like(norm), "new.weight": norm}, file, {"format": "pt"})
    said = lorastack.works("extract", "tuned", "base", "--rank", "4", "-o", "again")
    assert "changed, and not low-rank: model.norm.weight" in said
    assert "--save-rest saves it whole" in said
    assert not load("again").extras
    said = lorastack.works("extract", "tuned", "base", "--rank", "4", "-o", "whole", "--save-rest")
    assert "has no place in an adapter: new.weight" in said
    assert "--save-rest" not in said
    assert list(load("whole").extras["modules_to_save"]) == ["model.norm.weight"]
    # A weight of zeros in the base has changed by infinitely much, which JSON has no number for
    words = ("extract", "base", "tuned", "--rank", "4", "-o", "back", "--json")
    assert json.loads(lorastack.works(*words))["rest"] == {"model.norm.weight": None}
    assert load("back").num_adapters()


def test_gguf_out_of_folders(lorastack: Command) -> None:  # noqa: F811
    tuned(lorastack.folder)
    lorastack.works("extract", "tuned", "base", "--rank", "4", "-o", "again.gguf", "--dtype", "f16")
    assert load("again.gguf").naming == "gguf"
    assert "leave --save-rest out" in lorastack.fails(
        "extract", "tuned", "base", "--rank", "4", "-o", "b.gguf", "--save-rest"
    )


def test_errors_speak_of_flags(lorastack: Command) -> None:  # noqa: F811
    tuned(lorastack.folder)
    assert "give --rank, --energy or --tolerance" in lorastack.fails("extract", "tuned", "base", "-o", "again")
    assert "no linear layer" in lorastack.fails("extract", "base", "base", "--rank", "4", "-o", "again")
    assert "--rank is 0" in lorastack.fails("extract", "tuned", "base", "--rank", "0", "-o", "again")
    assert "exists" in lorastack.fails("extract", "tuned", "base", "--rank", "4", "-o", "luna")
    assert "is not replaced" in lorastack.fails("extract", "tuned", "base", "--rank", "4", "-o", "tuned", "--force")
    assert "is in base, a model, which" in lorastack.fails(
        "extract", "tuned", "base", "--rank", "4", "-o", "base/again"
    )
    assert "give two of a kind" in lorastack.fails("extract", "tuned", "base.gguf", "--rank", "4", "-o", "again")
