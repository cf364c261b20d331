"""The documentation's own examples show what comes out, every command is documented, and the demo shows its effects."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lorastack import recipe_text
from lorastack.cli.application import app
from tests import typed
from tests.conftest import ROOT, lacking

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_TASKS = (ROOT / "mkdocs.yml").read_text().partition("- How to:")[2].partition("- Reference:")[0]
#: The pages of tasks, but for those that measure and write no adapter.
HOW_TO = [
    ROOT / "docs" / name for name in re.findall(r": (\w+\.md)", _TASKS) if name not in ("compare.md", "report.md")
]


def written(page: Path, *languages: str) -> list[typed.Block]:
    """The blocks of a page in some languages."""
    return [block for block in typed.blocks(page.read_text()) if block.language in languages]


@pytest.fixture
def workplace(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo's files, where the examples' paths lead somewhere."""
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if written(p, "python", "console", *typed.SHOWN)], ids=lambda p: p.name
)
def test_a_page_can_be_typed_from_top_to_bottom_and_shows_what_comes_out(page: Path, workplace: Path) -> None:
    words = [sys.executable, str(ROOT / "tests" / "typed.py"), str(page)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    if missing := typed.lacked(page.read_text()):
        lacking(f"{page.name} loads its file in {' and '.join(missing)}, which is not installed: the rest of it ran")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("README.md", "cli.md")], ids=lambda p: p.name)
def test_what_is_not_run_says_so(page: Path) -> None:
    """The README's commands are typed by ``make walk``; those of cli.md are the help's."""
    assert [b.content for b in written(page, "sh", "py") if not b.title.startswith("Not run here")] == []


def test_every_recipe_on_a_page_is_given_to_a_command_there() -> None:
    for page in PAGES:
        typed_there = "".join(block.content for block in written(page, "console"))
        assert [b.content for b in written(page, "toml") if not b.title or b.title not in typed_there] == [], page


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.name)
def test_a_task_ends_in_a_file_that_another_program_loads(page: Path) -> None:
    """It is loaded where the page is typed, see above."""
    code = "".join(block.content for block in written(page, "python"))
    assert re.search(r"^from (peft|llama_cpp) import|\.load_lora_weights\(", code, re.MULTILINE)


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


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_command_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    made = script("build_reference", monkeypatch).reference()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python docs/build_reference.py"


def test_the_pictures_show_the_figures_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = script("build_pictures", monkeypatch)
    measured = pictures.RESULTS.read_text()
    for name, draw in pictures.PICTURES.items():
        assert (ROOT / "docs" / "assets" / name).read_text() == draw(measured), "run: python docs/build_pictures.py"
    changed = measured.replace("| 10.4 (10.1 to 10.5) |", "| 3.3 |", 1)
    assert ">10.4</text>" in pictures.PICTURES["time.svg"](measured)
    assert ">3.30</text>" in pictures.PICTURES["time.svg"](changed)
    assert ">10.4</text>" not in pictures.PICTURES["time.svg"](changed)


def test_a_figure_that_is_no_longer_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = script("build_pictures", monkeypatch)
    with pytest.raises(SystemExit, match=r"RESULTS\.md has 0 rows 'mergekit-extract-lora' in the table after"):
        pictures.PICTURES["time.svg"](pictures.RESULTS.read_text().replace("| mergekit-extract-lora", "| mergekit"))


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
