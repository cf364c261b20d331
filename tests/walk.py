"""Walk: type what the README and the site show, in a clean clone and an empty environment, as a stranger would.

Run: make walk, or python tests/walk.py [--without COMMAND]...

The two commands come first, then every other command and every Python block, twice in a row. The lines that install the
released package are typed in an environment of their own, where the name means a wheel of this clone; there the README
and the first pages of the built site are typed, with what they show, as `typed.py` types a page. Anything but success
ends the walk, and so does a traceback or a warning on the way.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = ("make demo", "make test")
#: Pages of the built site that are typed with the installed wheel.
FIRST = ("index", "tutorial", "coming")
#: What a stranger would stumble over.
STUMBLE = re.compile(r"Traceback|warning:|\bWARNING\b|Warning:|error:|Exception ignored|…", re.IGNORECASE)
#: What of that is this machine's, and not ours: pip's words on places where it looks for packages.
OF_THE_MACHINE = re.compile(r"WARNING: Location '.*' is ignored|WARNING: Running pip as the 'root' user|\[notice\]")
#: Pip asks for a way to the packages; all else a stranger's shell has not.
KEPT = re.compile(r"PATH|TERM|LANG|TMPDIR|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|PIP_.*|(?i:https?_proxy|no_proxy)")


def blocks(language: str) -> list[str]:
    """The README's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands() -> list[str]:
    """Every command of the README, without what it says of them."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    return [line for line in (re.sub(r"\s{2,}# .*", "", line).strip() for line in lines) if line]


def shown(page: Path) -> str:
    """The code blocks of a page of the built site, in order, as Markdown."""
    parts = re.findall(r'<div class="language-(\w+) highlight">.*?<code>(.*?)</code>', page.read_text(), re.DOTALL)
    assert parts, f"{page} shows no code"
    return "\n".join(f"```{name}\n{html.unescape(re.sub('<[^>]*>', '', code))}```\n" for name, code in parts)


class Shell:
    """A stranger's shell, which stays where ``cd`` and ``source`` lead."""

    def __init__(self, folder: Path, home: Path) -> None:
        home.mkdir(exist_ok=True)
        own = {key: value for key, value in os.environ.items() if KEPT.fullmatch(key)} | {"HOME": str(home)}
        self.environment, self.folder, self._entered = own, folder, ["set -e"]

    def type(self, line: str) -> None:
        """Type a line; what changes the shell itself is typed again before every later one."""
        print(f"$ {line}", flush=True)
        start = time.monotonic()
        script = "\n".join([*self._entered, line])
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        words = [text for text in said.splitlines() if STUMBLE.search(text) and not OF_THE_MACHINE.search(text)]
        if done.returncode or words:
            print(said[-4000:])
            sys.exit(f"walk: {line!r} ended with {done.returncode}" + "".join(f"\n  {text}" for text in words[:20]))
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
        if line.split()[0] in ("cd", "source"):
            self._entered.append(line)


def install(scratch: Path, clone: Path) -> None:
    """The lines that install the package, in an environment of their own."""
    lines = [line for line in commands() if line.startswith("pip install")]
    wheels = scratch / "wheels"
    named = clone / "src/lorastack/__init__.py"
    version = re.findall(r'__version__ = "(.*)"', named.read_text())[0] + "+walk"  # which no registry can have
    named.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', named.read_text()))
    shell = Shell(scratch, scratch / "another-home")
    shell.type(f"python3 -m venv {scratch}/builder && {scratch}/builder/bin/pip install --quiet build")
    shell.type(f"{scratch}/builder/bin/python -m build --wheel --outdir {wheels} {clone} > {scratch}/build.log 2>&1")
    (scratch / "known.txt").write_text((clone / "constraints.txt").read_text() + f"\nlorastack=={version}\n")
    shell.environment["PIP_CONSTRAINT"] = str(scratch / "known.txt")
    shell.environment["PIP_FIND_LINKS"] = f"{wheels} {shell.environment.get('PIP_FIND_LINKS', '')}"
    shell.type("python3 -m venv strangers")
    shell.type("source strangers/bin/activate")
    for line in lines:
        shell.type(line)
        shell.type("lorastack --help")
    shell.type("pip install peft")  # the pages' other program
    pages = {"README": (ROOT / "README.md").read_text()}
    pages |= {name: shown(clone / "site" / f"{name}.html") for name in FIRST}
    for name, text in pages.items():
        (scratch / f"{name}.md").write_text(text)
        shutil.copytree(clone / "examples/demo", scratch / f"playground-{name}")
        # In parentheses, since a shell that is led somewhere stays there.
        shell.type(f"(cd {scratch}/playground-{name} && python {clone}/tests/typed.py ../{name}.md)")


def main() -> None:
    """Walk once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", action="append", default=[], metavar="COMMAND", help="leave this one out")
    without = parser.parse_args().without
    scratch = Path(tempfile.mkdtemp(prefix="walk-"))
    try:
        clone = scratch / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        lines = [line for line in commands() if not line.startswith("pip install")]
        shell = Shell(clone, scratch / "home")
        for line in SETUP:
            assert line in lines, f"the README does not show {line}"
            shell.type("make .venv/.dev" if line in without and line == "make test" else line)
        for _ in range(2):
            for line in [line for line in lines if line not in SETUP]:
                if line.startswith("source") and any(known == line for known in shell._entered):
                    continue
                if line.startswith("cd ") and any(known == line for known in shell._entered):
                    continue
                shell.type(line)
            for n, block in enumerate(blocks("python")):
                (scratch / f"block{n}.py").write_text(block)
                shell.type(f"python {scratch}/block{n}.py")
        Shell(clone, scratch / "home").type("make docs")
        install(scratch, clone)
        print("the README and the first pages can be walked")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
