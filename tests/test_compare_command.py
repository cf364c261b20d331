"""``lorastack compare``: the tables and the JSON hold the numbers of `compare`, in folders too, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load
from lorastack.algebra.compare import compare
from tests.test_cli import Command, lorastack  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_json_holds_the_numbers_of_compare(lorastack: Command) -> None:  # noqa: F811
    said = json.loads(lorastack.works("compare", "luna:0.5", "robot:-1", "--json"))
    found = compare(LoraStack([(load("luna"), 0.5), (load("robot"), -1.0)]))
    assert said == json.loads(json.dumps(found.to_dict()))
    pair = said["pairs"][0]
    assert pair["cosine"] == pytest.approx(found.cosine[0, 1])
    assert "by_weight" not in pair
    more = json.loads(lorastack.works("compare", "luna:0.5", "robot:-1", "--json", "--weights"))
    assert len(more["pairs"][0]["by_weight"]["cosine"]) == len(said["weights"])


def test_a_folder_means_all_adapters_in_it_but_no_model(lorastack: Command) -> None:  # noqa: F811
    assert "give --base" in lorastack.fails("compare", "."), "GGUF and PEFT names do not mix without the base"
    said = json.loads(lorastack.works("compare", ".:0.5", "--base", "base", "--json", "--no-intruders"))
    assert [(one["name"], one["scale"]) for one in said["adapters"]] == [
        ("luna", 0.5),
        ("robot", 0.5),
        ("excited", 0.5),
    ]
    assert said["adapters"][0]["intruders"] is None
    assert said["adapters"][0]["relative"] > 0
    shutil.copytree("luna", "one/luna")
    assert [one["name"] for one in json.loads(lorastack.works("compare", "one", "--json"))["adapters"]] == ["luna"]


def test_the_tables_say_what_the_numbers_mean(lorastack: Command, cache: Path) -> None:  # noqa: F811
    out = lorastack.works("compare", "luna", "robot:-1", "luna:0.25", "--base", "base", "--weights")
    found = compare(LoraStack([(load("luna"), 1.0), (load("robot"), -1.0), (load("luna"), 0.25)]), "base")
    for one in found.adapters:
        assert f"{one.norm:.4g}" in out
        assert f"{one.relative:.2%}" in out
        assert f"{one.intruders} of {one.examined}" in out
    assert "near-duplicates: luna and luna#2, cosine 1.0000, the second 0.25 times as strong" in out
    assert "pile up" in out
    assert "are independent" in out
    assert f"{found.in_overlap[0, 1]:.3f} ({found.in_chance[0, 1]:.3f})" in out
    assert "model.layers.3.mlp.up_proj.weight" in out
    assert len(list((cache / "lorastack" / "svd").iterdir())) == 28
    assert not list(lorastack.folder.glob("**/*.npz"))


def test_one_adapter_is_a_table_without_pairs(lorastack: Command) -> None:  # noqa: F811
    out = lorastack.works("compare", "luna", "--base", "base", "--no-cache")
    assert "luna" in out
    assert "cosine" not in out


def test_many_adapters_are_cut_to_what_can_be_read(lorastack: Command) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    Path("many").mkdir()
    for n in range(14):
        a, b = rng.standard_normal((2, 16)).astype(np.float32), rng.standard_normal((16, 2)).astype(np.float32)
        LoadedLora.from_tensors({name: (a, b)}, name=f"a{n}").save(f"many/a{n}")
    out = lorastack.works("compare", "many")
    assert "cosine, the first 12 of 14; --json has all" in out
    assert "the 20 pairs of 91 that matter most; --json has all" in out
    assert len(json.loads(lorastack.works("compare", "many", "--json"))["pairs"]) == 91


def test_what_is_left_out_of_account_is_said(lorastack: Command, shared: Path) -> None:  # noqa: F811
    out = lorastack.works("compare", shared / "stories260k" / "adapters" / "excited-dora")
    assert "excited-dora: left out of account: 15 dora: a DoRA magnitude" in out


def test_errors_list_everything(lorastack: Command) -> None:  # noqa: F811
    error = lorastack.fails("compare", "nowhere", "luna:x")
    assert "'x' is no scale" in error
    error = lorastack.fails("compare", "luna", "nothing-here", "nor-here")
    assert "nothing-here" in error
    assert "nor-here" in error
