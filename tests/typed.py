"""Type a page of the documentation from top to bottom in one folder, as its reader would, and compare what it shows.

Run: python tests/typed.py PAGE [--write]     (in a folder with the demo's files; --write puts in what came out)

- ``python`` blocks run one after another in one interpreter.
- Every line of a ``console`` block is a ``$ lorastack ...`` command. It ends well, or the page shows its error.
- A ``text`` block, or an ``output`` block where lines are not to be broken, is what the block right before it printed:
  nothing else is written so.
- A block of another language whose title is a file's name is that file.
- ``sh`` and ``py`` blocks are not run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
#: What is left of a number after float32.
ROUNDING = re.compile(r"\b\d(\.\d+)?e-0[6-9]\b")
#: How what was printed is written.
SHOWN = ("text", "output")
#: Programs that a page may load its file in and a plain machine may lack.
OPTIONAL = ("llama_cpp",)


@dataclass
class Block:
    """One fenced block, and where its content lies in the page."""

    language: str
    title: str
    content: str
    start: int
    end: int
    #: Nothing but white space lies between it and the block before.
    follows: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    last = -1
    for match in FENCE.finditer(text):
        follows = last >= 0 and not text[last : match.start()].strip()
        found.append(Block(match[1], match[2] or "", match[3], match.start(3), match.end(3), follows))
        last = match.end()
    return found


def lacked(text: str) -> list[str]:
    """The programs that a page loads its file in and that are not installed here."""
    code = "".join(block.content for block in blocks(text) if block.language == "python")
    return [name for name in OPTIONAL if _imports(code, name) and importlib.util.find_spec(name) is None]


def _imports(code: str, name: str) -> bool:
    return re.search(rf"^\s*(import|from) {name}\b", code, re.MULTILINE) is not None


def lines(text: str) -> list[str]:
    """Lines as they are compared: a page keeps no white space at a line's end; rounding errors are a machine's own."""
    return [ROUNDING.sub("~0", line).rstrip() for line in text.strip("\n").splitlines()]


def placed(text: str) -> str:
    """What was printed, as it is where the page's reader is: the playground."""
    return text.replace(str(Path.cwd()), "/home/you/playground")


def python(code: str, names: dict[str, Any], page: Path) -> str:
    """Run a block among the names of those before it; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page.name, "exec"), names)
    return printed.getvalue()


def console(commands: str) -> str:
    """Run the commands of a block; what they printed, with the errors of one that failed."""
    said = ""
    for line in commands.splitlines():
        if not line.startswith("$ lorastack "):
            sys.exit(f"{line!r} is no command that can be run here: write it as sh, which is not run")
        words = [sys.executable, "-c", "from lorastack.cli import main; main()"]
        words += shlex.split(line.removeprefix("$ lorastack "))
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        said += done.stdout if done.returncode == 0 else done.stdout + done.stderr
        if done.returncode and not done.stderr.startswith("error: "):
            sys.exit(f"{line} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return said


def typed(page: Path) -> tuple[str, list[str]]:
    """Type a page; its text with what came out in place of what it shows, and where the two differ."""
    text = page.read_text()
    made, wrong, at = "", [], 0
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(text):
        if block.language in SHOWN:
            if not block.follows:
                wrong.append(f"a text block shows what nothing before it printed:\n{block.content}")
            elif printed is not None and lines(block.content) != lines(printed):
                wrong.append(f"the page shows\n{block.content}where this came out\n{printed}")
            if block.follows and printed is not None:
                out = [line.rstrip() + "\n" for line in printed.strip("\n").splitlines()]
                made += text[at : block.start] + "".join(out)
                at = block.end
            printed = None
            continue
        wrong += _unshown(printed)
        printed = None
        if block.language == "python" and not any(_imports(block.content, name) for name in lacked(text)):
            printed = placed(python(block.content, names, page))
        elif block.language == "console":
            printed = placed(console(block.content))
        elif block.language not in ("sh", "py") and re.fullmatch(r"[\w.]+", block.title):
            Path(block.title).write_text(block.content)
    return made + text[at:], wrong + _unshown(printed)


def _unshown(printed: str | None) -> list[str]:
    """An error that no text block showed."""
    failed = printed is not None and re.search("^error: ", printed, re.MULTILINE)
    return [f"a command failed, and the page does not show it:\n{printed}"] if failed else []


def main() -> None:
    """Type one page in this folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="put what came out in the page")
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path[0] = ""  # this folder's neighbours have names of packages
    made, wrong = typed(said.page)
    if said.write:
        said.page.write_text(made)
    elif wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
