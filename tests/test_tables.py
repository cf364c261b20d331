"""Tables as people see them: in a pipe nothing is cut, on a narrow terminal no number is."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from lorastack import LoadedLora
from lorastack.cli.tables import fixed, short_names

COUNT = 8


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters with long names, of weights with long names; two of them nearly opposite."""
    folder = tmp_path_factory.mktemp("eight")
    rng = np.random.default_rng(0)
    names = [f"model.layers.{n}.self_attn.{m}_proj.weight" for n in range(3) for m in "qv"]
    for n in range(COUNT):
        factors = {
            name: (rng.standard_normal((4, 32)).astype("f4"), rng.standard_normal((32, 4)).astype("f4"))
            for name in names
        }
        lora = LoadedLora.from_tensors(factors, alpha=8, name=f"a-rather-long-name-of-adapter-{n}", naming="hf")
        lora.save(folder / lora.name)
    return folder


def in_terminal(columns: int, folder: Path, *words: str) -> str:
    """What ``lorastack WORDS`` shows on a terminal of so many columns, without colours."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "lorastack", *words], stdout=there, stderr=there, cwd=folder, env=environment
    ) as process:
        os.close(there)
        shown = b""
        while True:
            try:
                part = os.read(here, 1 << 16)
            except OSError:  # the other side was closed
                break
            if not part:
                break
            shown += part
        assert process.wait() == 0, shown.decode()
    os.close(here)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def numbers(text: str) -> set[str]:
    return set(re.findall(r"-?\d+\.\d{3}\b", text))


@pytest.fixture(scope="module")
def found(eight: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "lorastack", "compare", ".", "--json"], cwd=eight, capture_output=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_on_a_terminal_no_line_is_too_wide_and_no_number_is_lost(eight: Path, found: dict, columns: int) -> None:
    shown = in_terminal(columns, eight, "compare", ".")
    tables = [line for line in shown.splitlines() if line[:1] in "┏┡│┃└"]
    assert tables
    assert max(map(len, tables)) <= columns
    assert "…" not in shown
    wanted = {fixed(pair["cosine"], 3) for pair in found["pairs"]}
    assert wanted <= numbers(shown)
    for adapter in found["adapters"]:
        assert f"{adapter['norm']:.4g}" in shown
        assert adapter["name"] in shown.replace("│", "").replace("\n", "") or columns < 80
    assert "L2.v_proj" in shown or "L0.q_proj" in shown


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_inspect_fits_a_terminal_too(eight: Path, columns: int) -> None:
    shown = in_terminal(columns, eight, "inspect", ".")
    tables = [line for line in shown.splitlines() if line[:1] in "┏┡│┃└"]
    assert max(map(len, tables)) <= columns
    assert "…" not in shown
    assert shown.count("1,536") == COUNT, "the parameters of each"


def test_a_pipe_gets_everything(eight: Path, found: dict) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorastack", "compare", ".", "--weights"],
        cwd=eight, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "40"},
    )  # fmt: skip
    assert "…" not in done.stdout
    assert "model.layers.2.self_attn.v_proj.weight" in done.stdout
    for one in found["adapters"]:
        assert one["name"] in done.stdout
    assert "\x1b" not in done.stdout


def test_names_are_short_only_where_that_tells_them_apart() -> None:
    twins = ["encoder.layers.0.q_proj.weight", "decoder.layers.0.q_proj.weight"]
    assert list(short_names(twins).values()) == ["encoder.layers.0.q_proj", "decoder.layers.0.q_proj"]
    assert short_names(["transformer.h.11.attn.c_attn.weight"]) == {"transformer.h.11.attn.c_attn.weight": "L11.c_attn"}


@pytest.mark.parametrize("columns", [60, 80])
def test_letters_that_take_two_cells_are_counted_as_two(tmp_path: Path, columns: int) -> None:
    lora = LoadedLora.from_tensors({"model.layers.0.q.weight": (np.ones((1, 4)), np.ones((4, 1)))}, naming="hf")
    for n in range(5):
        lora.renamed(f"長い名前の適応器{n}" * 3).save(tmp_path / (f"長い名前の適応器{n}" * 3))
    shown = in_terminal(columns, tmp_path, "compare", ".")
    tables = [line for line in shown.splitlines() if line[:1] in "┏┡│┃└"]
    assert max(map(cell_len, tables)) <= columns
    assert all(f"応器{n}" in shown.replace("\n", "") or f"器{n}" in shown for n in range(5))


def test_nothing_is_minus_zero() -> None:
    assert [fixed(x, 3) for x in (-0.0, -0.0004, 0.0004, -1.0, -0.0005001)] == [
        "0.000", "0.000", "0.000", "-1.000", "-0.001"]  # fmt: skip
