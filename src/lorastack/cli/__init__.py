"""The ``lorastack`` command: one file per subcommand, which parses, calls one function and prints."""

from __future__ import annotations

import sys

from lorastack.cli.app import app
from lorastack.errors import LoraStackError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; an error of ours is printed plainly and exits with 1."""
    try:
        app()
    except LoraStackError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(str(error))}")
        sys.exit(1)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
