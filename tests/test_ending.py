"""How the command ends: whatever is raised in it is one line and an exit code, never a raw traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from lorastack.cli import main
from lorastack.cli.ending import run_to_its_end
from lorastack.errors import LoraStackError

MISTAKE = "error: this is a mistake in lorastack, not in what you gave it: "
WAY = "; LORASTACK_TRACEBACK=1 in the environment shows where, for a report\n"


class Sudden(Exception):  # noqa: N818
    """What nobody expects."""


def raised(error: BaseException) -> Callable[..., object]:
    def raising(*_: object, **__: object) -> object:
        raise error

    return raising


ENDS: dict[str, tuple[BaseException, int, str]] = {
    "ours": (LoraStackError("x.gguf: it is damaged"), 1, "error: x.gguf: it is damaged\n"),
    "the system's": (OSError(28, "No space left on device", "out"), 1, "error: out: No space left on device\n"),
    "without words": (OSError(), 1, "error: OSError\n"),
    "a text": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), 1, "error: a text cannot be read or written: 'utf-8' "
               "codec can't encode character '\\udcff' in position 0: no\n"),
    "memory": (MemoryError("Unable to allocate 8 TiB"), 1,
               "error: there is not enough memory: Unable to allocate 8 TiB\n"),
    "depth": (RecursionError("maximum"), 1, "error: something here is nested too deep\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, ""),
    "a mistake": (Sudden("this\nand\tthat"), 70, f"{MISTAKE}Sudden: this and that{WAY}"),
    "one without words": (ZeroDivisionError(), 70, f"{MISTAKE}ZeroDivisionError:{WAY}"),
    "one with markup and controls": (KeyError("[bold]\x1b[2J"), 70, f"{MISTAKE}KeyError: '[bold]\\x1b[2J'{WAY}"),
    "one with a novel": (ValueError("x" * 10_000), 70, f"{MISTAKE}ValueError: {'x' * 488}{WAY}"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_whatever_is_raised_is_one_line_and_a_code(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORASTACK_TRACEBACK", raising=False)
    error, code, said = ENDS[what]
    with pytest.raises(SystemExit) as ended:
        run_to_its_end(raised(error))
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err) == (code, "", said)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_mistake_inside_a_command_shows_its_place_to_who_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorastack.files as command

    monkeypatch.setattr(command, "check_output", raised(Sudden("here")))
    monkeypatch.setattr(sys, "argv", ["lorastack", "bake", "x.gguf", "-o", "out"])
    for asked in (False, True):
        monkeypatch.setenv("LORASTACK_TRACEBACK", "1") if asked else monkeypatch.delenv(
            "LORASTACK_TRACEBACK", raising=False
        )
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (70, "")
        assert err.endswith(f"{MISTAKE}Sudden: here{'' if asked else WAY.rstrip()}\n")
        assert ("Traceback (most recent call last)" in err) is asked
        assert ("in raising" in err) is asked


def test_the_process_ends_so_too() -> None:
    program = "import lorastack.recipe as command\nfrom lorastack.cli import main\ncommand.load = None\nmain()"
    env = {key: value for key, value in os.environ.items() if key != "LORASTACK_TRACEBACK"}
    words = [sys.executable, "-c", program, "inspect", "x.gguf"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == f"{MISTAKE}TypeError: 'NoneType' object is not callable{WAY}"
