"""What is printed: no control character of a file or a name reaches a terminal; prose keeps the marks of its script."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import lorastack.cli
from lorastack import LoadedLora, save
from lorastack.cli.application import app
from lorastack.cli.console import echo, echo_json
from lorastack.errors import LoraStackError, printable

EVIL = "\x1b]0;PWNED\x07\x1b[2J\x9b31m\u202eX\r\x00"
OBEYED = [
    chr(n) for n in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)) if n not in (9, 10)
]


@pytest.mark.parametrize("text", ["naïve 漢字 العربية 👩‍👩‍👧 zéro", "a\tb\nc", "\u200d\u200c"])
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == printable(text, prose=True) == text


def test_what_a_terminal_obeys_is_spelt_out() -> None:
    for character in OBEYED:
        for prose in (False, True):
            assert printable(character, prose=prose) in (f"\\x{ord(character):02x}", f"\\u{ord(character):04x}")
    assert printable("\u200b\ufeff\U000e0041") == "\\u200b\\ufeff\\U000e0041"
    assert printable("\u200f", prose=True) == "\u200f"


def test_errors_have_no_control_characters() -> None:
    error = LoraStackError(EVIL, [EVIL, "x" * 100_000])
    assert not set(str(error) + "".join(error.problems)) & set(OBEYED)
    assert len(str(error)) < 4000


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter with such a name, base and weight, as JSON and a file system hold them."""
    monkeypatch.chdir(tmp_path)
    name = "n" + EVIL.replace("\x00", "").replace("\r", "")
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    weight = "model.layers.0.self_attn.q_proj.weight"
    save(LoadedLora.from_tensors({weight: pair}, naming="hf"), name)
    config = json.loads(Path(name, "adapter_config.json").read_text())
    Path(name, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": EVIL}))
    return name


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["inspect", "--json"], ["compare"], ["compare", "--json"], ["bake", "-o", "o"],
     ["bake", "-o", "o.gguf"], ["apply", "-t", "w", "-i", "no.npy", "-o", "y.npy"], ["run", "--rows", f"{EVIL}:1 | x"]],
)  # fmt: skip
def test_no_command_prints_them(evil: str, words: list[str]) -> None:
    done = CliRunner().invoke(app, [words[0], evil, *words[1:]])
    said = done.output + str(done.exception or "")
    assert said
    assert not set(said) & set(OBEYED)


def test_what_a_model_writes_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    echo("he said\n\t\u200fשלום\x1b[2J", prose=True)
    echo_json({"a": "\x9b\u202e\udcff"})
    assert capsys.readouterr().out == 'he said\n\t\u200fשלום\\x1b[2J\n{\n  "a": "\\u009b\\u202e\\udcff"\n}\n'


def test_one_file_of_the_commands_prints() -> None:
    """No other file of the commands escapes markup, or prints by typer or print what is not constant."""
    wrong = []
    for path in sorted(Path(lorastack.cli.__file__).parent.glob("*.py")):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "escape" for alias in node.names):
                wrong.append(f"{path.name} imports escape")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write"):
                wrong.append(f"{path.name}: {ast.unparse(node)[:60]}")
    assert wrong == ["application.py: typer.echo(f'lorastack {__version__}')"]
