"""The ``lorastack`` command: one file per subcommand, which parses, calls one function and prints."""

from __future__ import annotations

from lorastack.cli.app import app
from lorastack.cli.ending import run_to_its_end

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; an error of ours is printed plainly and exits with 1."""
    run_to_its_end(app)
