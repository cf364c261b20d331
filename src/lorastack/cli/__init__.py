"""The ``lorastack`` command: one file per subcommand, which parses, calls one function and prints."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from lorastack.cli.app import app
from lorastack.errors import LoraStackError, LoraStackWarning

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; an error of ours is printed plainly and exits with 1."""
    warnings.simplefilter("once", LoraStackWarning)
    warnings.showwarning = _show_warning
    try:
        app()
    except LoraStackError as error:
        _say("[bold red]error:[/]", str(error))
        sys.exit(1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of ours, printed plainly; the place in our code is nothing to the reader."""
    if issubclass(category, LoraStackWarning):
        _say("[bold yellow]warning:[/]", str(message))
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=file or sys.stderr, end="")


def _say(what: str, text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{what} {escape(text)}")
