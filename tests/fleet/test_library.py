"""A library lists what lies in its folder and nothing beyond it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorastack.errors import ArgumentError, FormatError, UnknownNameError
from lorastack.fleet import Library
from lorastack.formats import opened
from lorastack.mixture import Mixture
from tests.fleet.makers import adapter, library


@pytest.fixture
def loras(tmp_path: Path, demo: Path) -> Path:
    folder = library(tmp_path / "loras")
    shutil.copy(demo / "excited.gguf", folder)
    (folder / "calm.toml").write_text('[[adapter]]\nsource = "a0"\nscale = 0.5\n[[adapter]]\nsource = "a1"\n')
    return folder


def test_folders_ggufs_and_recipes_are_listed_one_level_deep(loras: Path, tmp_path: Path) -> None:
    (loras / "more").mkdir()
    adapter(7).save(loras / "more" / "inner")
    (loras / "README.md").write_text("no adapter")
    adapter(8).save(loras / ".hidden")
    adapter(8).save(loras / "with space")
    adapter(9).save(tmp_path / "outside")
    (loras / "link").symlink_to(tmp_path / "outside")
    (loras / "alias").symlink_to(loras / "a0")
    (loras / "gone").symlink_to(loras / "nothing")
    found = Library(loras)
    assert found.names() == ["a0", "a1", "a2", "alias", "calm", "excited"]
    for name in ("link", "more", ".hidden", "gone", "inner"):
        with pytest.raises(UnknownNameError, match=r"there are 6: a0, a1, a2, alias, calm, excited"):
            found.path(name)


def test_all_that_is_missing_is_named_with_what_is_near(loras: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"no adapter named a9, exited in the library.*did you mean .*excited"):
        Library(loras).recipe(Mixture.parse("a0+a9+exited:0.5"))


def test_a_recipe_is_a_mixture_with_a_name(loras: Path) -> None:
    found = Library(loras).recipe(Mixture.parse("calm:0.5+a2:2"))
    assert [(Path(one.source).name, one.scale) for one in found.ingredients] == [("a2", 2.0), ("a0", 0.25), ("a1", 0.5)]
    assert all(one.sha256 for one in found.ingredients)


def test_sources_outside_are_refused(loras: Path, tmp_path: Path) -> None:
    adapter(9).save(tmp_path / "outside")
    (loras / "out.toml").write_text('[[adapter]]\nsource = "../outside"\n')
    with pytest.raises(ArgumentError, match="lies outside of"):
        Library(loras).recipe(Mixture.parse("out"))
    (loras / "hub.toml").write_text('[[adapter]]\nsource = "owner/name"\n')
    with pytest.raises(ArgumentError, match="lies outside of"):
        Library(loras).recipe(Mixture.parse("hub"))
    weights = loras / "a0" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"adapter_model.safetensors leads out of"):
        Library(loras).recipe(Mixture.parse("a0"))


def test_two_of_one_name_are_an_error(loras: Path) -> None:
    adapter(5).save(loras / "excited")
    with pytest.raises(ArgumentError, match=r"excited is both excited and excited.gguf"):
        Library(loras).path("excited")


def test_nothing_is_opened_for_a_request_that_repeats(loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Library(loras)
    mixture = Mixture.parse("a0+calm:0.5+excited")
    first = found.recipe(mixture)
    looked: list[object] = []
    monkeypatch.setattr(opened, "_open", lambda path: looked.append(path))
    assert found.recipe(mixture) == first
    assert looked == []
    monkeypatch.undo()
    adapter(6).save(loras / "a0", force=True)
    assert found.recipe(mixture).ingredients[0].sha256 != first.ingredients[0].sha256


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no such folder"):
        Library(tmp_path / "nothing")
