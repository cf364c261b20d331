"""A folder, a recipe and a name mean the same to every command and in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorastack import LoraStack, load
from lorastack.errors import ArgumentError, FormatError
from lorastack.recipe import Recipe, load_stack
from tests.test_cli import Command, lorastack  # noqa: F401


@pytest.fixture
def three(lorastack: Command) -> Command:  # noqa: F811
    """The command beside a folder ``all`` of two PEFT folders, one deeper, and ``one`` with one adapter."""
    shutil.copytree("luna", "all/luna")
    shutil.copytree("robot", "all/more/robot")
    shutil.copytree("luna", "one/inside/luna")
    return lorastack


def test_a_folder_is_all_its_adapters_to_every_command(three: Command) -> None:
    assert [one["name"] for one in json.loads(three.works("inspect", "all", "--json"))] == ["luna", "robot"]
    found = json.loads(three.works("compare", "all:0.5", "--json"))
    assert [(one["name"], one["scale"]) for one in found["adapters"]] == [("luna", 0.5), ("robot", 0.5)]
    (baked,) = json.loads(three.works("bake", "all:0.5", "-o", "both", "--json"))
    assert baked["adapters"] == 2
    by_hand = LoraStack([(load("luna"), 0.5), (load("robot"), 0.5)]).bake()
    name = next(iter(by_hand.adapters))
    assert load("both").adapters[name].dense() == pytest.approx(by_hand.adapters[name].dense(), abs=1e-6)
    assert json.loads(three.works("report", "all", "-o", "r.html", "--json"))["adapters"] == 2
    (said,) = json.loads(three.works("run", "base", "all", "-p", "Once", "-n", "2", "--json"))
    assert said["adapters"] == {"luna": 1.0, "robot": 1.0}
    assert load_stack(["all"]).names == ("luna", "robot")
    Path("r.toml").write_text('[[adapter]]\nsource = "all"\nscale = 0.5\n')
    assert Recipe.read(Path("r.toml")).stack().entries[1][1] == 0.5


def test_a_folder_with_one_adapter_is_that_one(three: Command) -> None:
    assert json.loads(three.works("inspect", "one", "--json"))[0]["name"] == "luna"
    assert load("one").name == "luna"


def test_where_one_is_wanted_all_are_listed(three: Command) -> None:
    with pytest.raises(FormatError) as caught:
        load("all")
    assert caught.value.problems == ("all/luna", "all/more/robot")
    with pytest.raises(ArgumentError, match="a name is for one adapter, and it holds 2") as named:
        load_stack(["mine=all"])
    assert len(named.value.problems) == 2


def test_a_recipe_is_an_adapter_to_inspect_and_in_python(three: Command) -> None:
    Path("r.toml").write_text('[[adapter]]\nsource = "luna"\nscale = 0.5\n[[adapter]]\nsource = "robot"\n')
    (one,) = json.loads(three.works("inspect", "r.toml", "--json"))
    assert (one["name"], one["weights"], one["ranks"]) == ("r", 28, [16])
    assert load("r.toml").rank == 16


def test_a_moved_recipe_says_what_it_is_where_it_looked_and_what_lies_near(three: Command) -> None:
    Path("sub").mkdir()
    Path("sub/r.toml").write_text('[[adapter]]\nsource = "loras/luna"\n')
    shutil.copytree("luna", "sub/deep/luna")
    Path("luna").rename("gone")
    said = three.fails("bake", "sub/r.toml", "-o", "out")
    assert "recipe sub/r.toml: its source loras/luna: there is no such file or folder" in said
    assert f"{Path('sub/loras/luna').absolute()} is not there either; did you mean sub/deep/luna?" in said


def test_a_name_of_ones_own_goes_with_an_adapter_everywhere(three: Command) -> None:
    found = json.loads(three.works("compare", "hers=luna:0.5", "robot", "--json"))
    assert [(one["name"], one["scale"]) for one in found["adapters"]] == [("hers", 0.5), ("robot", 1.0)]
    rows = ["--rows", "'my style':0.5, robot | Once", "--rows", "| Once"]
    said = json.loads(three.works("run", "base", "my style=luna", "robot", *rows, "-n", "2", "--json"))
    assert [one["adapters"] for one in said] == [{"my style": 0.5, "robot": 1.0}, {}]
    three.works("bake", "hers=luna:0.5", "robot", "-o", "named")
    (one,) = json.loads(three.works("inspect", "named", "--json"))
    assert 'name = "hers"' in one["recipe"]


def test_a_file_with_a_colon_is_reachable_with_and_without_a_scale(three: Command) -> None:
    Path("luna").rename("v1:0.5")
    for word, scale in (("v1:0.5", 1.0), ("v1:0.5:0.25", 0.25)):
        (one,) = json.loads(three.works("compare", word, "--json"))["adapters"]
        assert (one["name"], one["scale"]) == ("v1:0.5", scale)


def test_a_moved_recipe_says_the_same_of_its_base(three: Command) -> None:
    Path("sub").mkdir()
    Path("sub/r.toml").write_text('base = "models/base"\n[[adapter]]\nsource = "../luna"\n')
    said = three.fails("bake", "sub/r.toml", "-o", "out")
    assert "recipe sub/r.toml: its base" in said
    assert "models/base: there is no such file or folder" in said
    assert f"{Path('sub/models/base').absolute()} is not there either" in said
    with pytest.raises(FormatError, match=r"recipe sub/r\.toml: its base"):
        load("sub/r.toml")
    three.works("bake", "sub/r.toml", "--base", "base", "-o", "out")
