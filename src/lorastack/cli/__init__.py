"""The ``lorastack`` command: one file per subcommand, which parses, calls one function and prints."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command; an error of ours is printed plainly and exits with 1."""
    try:  # imports take a moment too
        from lorastack.cli.app import app
        from lorastack.cli.ending import run_to_its_end
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_to_its_end(app)
