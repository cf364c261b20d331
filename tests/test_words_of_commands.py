"""What every command has: help that starts at once and can be copied from, JSON, quiet, completion, python -m."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from lorastack import __version__
from lorastack.cli.application import app
from lorastack.cli.group import COMMANDS
from tests.test_cli import Command, lorastack  # noqa: F401

GROUP = typer.main.get_command(app)


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_needs_neither_numpy_nor_gguf(words: list[str]) -> None:
    program = (
        f"import sys\nfrom lorastack.cli import main\nsys.argv = ['lorastack', *{words!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'gguf', 'torch', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "other = [name for name in sys.modules if name == 'lorastack.cli.bake' and len(sys.argv) == 2]\n"
        "sys.exit(f'loaded: {heavy} {other}' if heavy or other else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in words or COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_list_is_the_beginning_of_the_help(name: str) -> None:
    said = COMMANDS[name][2].rstrip(".").lower()
    assert GROUP.commands[name].help.lower().startswith(said[:22])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_in_lines_of_their_own_and_no_types_of_python(lorastack: Command, name: str) -> None:  # noqa: F811
    shown = lorastack.works(name, "--help")
    examples = re.findall(rf"^    (lorastack {name} .*)$", shown, re.MULTILINE)
    assert len(examples) >= 2
    assert not re.search(r"<\w+>|`|list\[", shown)
    assert "--json" in shown
    assert "-q, --quiet" in shown
    assert shown.splitlines()[0].startswith(f"Usage: lorastack {name} [OPTIONS] ")


def test_python_m_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorastack", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == f"lorastack {__version__}\n"


def test_every_command_prints_json_and_nothing_else(lorastack: Command) -> None:  # noqa: F811
    import numpy as np

    np.save("x.npy", np.ones(64, np.float32))
    weight = "model.layers.0.self_attn.q_proj.weight"
    said = {
        "apply": ["luna", "-t", weight, "-i", "x.npy", "-o", "y.npy"],
        "bake": ["luna", "robot:0.5", "-o", "both", "--rank", "4"],
        "compare": ["luna", "robot"],
        "convert": ["luna", "for-vllm", "--for", "vllm"],
        "inspect": ["luna"],
        "merge": ["base", "luna", "-o", "merged"],
        "extract": ["merged", "base", "--rank", "8", "-o", "again"],
        "report": ["luna", "-o", "r.html"],
        "resize": ["luna", "--rank", "2", "-o", "small"],
        "run": ["base", "luna", "-p", "Once", "-n", "2"],
        "tune": ["base", "luna", "--text", "eval.txt", "--trials", "3"],
        "vllm-check": ["base", "--library", "."],
    }
    assert set(said) == set(COMMANDS) - {"push"}  # which asks the hub: see test_push.py
    found = {name: json.loads(lorastack.works(name, *words, "--json")) for name, words in said.items()}
    assert (found["apply"]["shape"], found["apply"]["adapters"]) == ([64], 1)
    assert found["bake"][0]["ranks"] == [4]
    assert 0 < found["bake"][0]["error"] < 1
    assert found["report"]["size"] == Path("r.html").stat().st_size
    assert found["resize"][0]["output"] == "small"
    assert found["merge"]["changed"] == 28
    assert found["extract"]
    assert found["run"][0]["prompt"] == "Once"
    assert set(found["tune"]["scales"]) == {"luna"}


def test_quiet_says_only_what_was_asked_for(lorastack: Command) -> None:  # noqa: F811
    assert lorastack.works("bake", "luna", "-o", "both", "-q") == ""
    assert lorastack.works("bake", "luna", "-o", "both", "--force", "--quiet") == ""
    assert "luna" in lorastack.works("inspect", "luna", "-q")
    assert "there is no such file" in lorastack.fails("inspect", "gone", "-q")
    assert lorastack.works("resize", "luna", "--rank", "2", "-o", "small") != "", "the next command speaks again"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lorastack bake x --dtype ", {"f32", "f16", "bf16", "q8_0"}),
        ("lorastack bake x --method ti", {"ties@dense", "ties@knots", "ties@core"}),
        ("lorastack run base --device cu", {"cuda"}),
        ("lorastack run base --dtype ", {"auto", "f32", "f16", "bf16"}),
        ("lorastack merge base x --round s", {"stochastic"}),
        ("lorastack merge base x --outtype q", {"q8_0", "q4_0"}),
        ("lorastack merge base x --method ti", {"ties@knots"}),
        ("lorastack ins", {"inspect"}),
    ],
)
def test_values_are_completed(words: str, offered: set[str]) -> None:
    """As bash asks for it."""
    environment = {
        **os.environ,
        "_LORASTACK_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = Path(sys.executable).with_name("lorastack")
    done = subprocess.run([command], capture_output=True, text=True, env=environment, check=False)
    assert offered <= set(done.stdout.split()), done.stdout + done.stderr
