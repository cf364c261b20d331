"""The documentation's own examples run, every command is documented, and the demo shows what it says."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from lorastack import recipe_text
from lorastack.cli.application import app
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo's files, where the examples' paths lead somewhere."""
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_examples_run(page: Path, workplace: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.name)
def test_command_examples_run_and_print_what_the_page_shows(page: Path, workplace: Path) -> None:
    shown = re.findall(r"```console\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(), re.DOTALL)
    for commands, text in shown:
        printed = ""
        for line in commands.splitlines():
            assert line.startswith("$ lorastack ")
            words = shlex.split(line.removeprefix("$ lorastack "))
            done = subprocess.run([sys.executable, "-c", "from lorastack.cli import main; main()", *words],
                                  capture_output=True, text=True, check=False, cwd=workplace)  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            printed += done.stdout
        if text:
            assert [line.rstrip() for line in text.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_recipe_examples_load(workplace: Path) -> None:
    from lorastack.recipe import load_stack

    for page in PAGES:
        for text in blocks(page, "toml"):
            (workplace / "recipe.toml").write_text(text)
            assert load_stack(["recipe.toml"], base="base", naming="hf").weights


def test_every_command_is_documented_with_an_example() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## lorastack {name}\n" in reference
        assert f"`lorastack {name} " in (command.help or ""), f"{name} has no example in its help"


def test_every_option_is_in_the_reference_and_says_what_it_is() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text()
    parts = dict(re.findall(r"^## lorastack (\S+)\n(.*?)(?=^## |\Z)", reference, re.DOTALL | re.MULTILINE))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert parts.keys() == commands.keys()
    for name, command in commands.items():
        listed = re.findall(r"^\| (.+?) \| (.+?) \|$", parts[name], re.MULTILINE)
        documented = {word for words, _ in listed for word in re.findall(r"`(-[^`]+)`", words)}
        options = [one for one in command.params if one.param_type_name == "option"]
        assert documented == {word for one in options for word in (*one.opts, *one.secondary_opts)}, name
        assert all(said.strip() for _, said in listed), name


def test_the_page_on_recipes_has_every_key_and_no_other() -> None:
    page = (ROOT / "docs" / "bake.md").read_text()
    (table,) = re.findall(r"\| key \| what it says \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE))
    assert rows.keys() == recipe_text.ADAPTER_KEYS
    assert set(re.findall(r"`\{(\w+) =", rows["steps"])) == recipe_text.STEPS
    (whole,) = re.findall(r"^Keys of the whole: (.*?):\n", page, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`\[*(\w+)\]*`", whole)) == recipe_text.KEYS


def test_the_command_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "build_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.reference(), "run: python docs/build_reference.py"


def test_the_demo_shows_every_adapters_effect_and_the_baked_text_is_the_stacks() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], capture_output=True, text=True, check=True
    )
    shown = {part.splitlines()[0]: part for part in done.stdout.split("\n\n")}
    both = shown["1 x excited + 1 x luna"]
    assert "Luna" in both
    assert "!" in both
    assert "!" not in shown["the base"]
    assert "Luna" not in shown["the base"]
    assert "robot" in shown["1 x robot"]
    assert (
        shown["the base"].splitlines()[1:] == shown["the base again: nothing of the model was touched"].splitlines()[1:]
    )
    assert "same text as the stack: True" in done.stdout
