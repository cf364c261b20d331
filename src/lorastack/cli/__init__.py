"""The ``lorastack`` command: one file per subcommand, which parses, calls one function and prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorastack.cli.application import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; an error of ours is printed plainly and exits with 1."""
    try:  # imports take a moment too
        from functools import partial

        from lorastack.cli.application import app
        from lorastack.cli.ending import run_to_its_end
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_to_its_end(partial(app, prog_name="lorastack"))  # however it was started


def __getattr__(name: str) -> Any:
    if name == "app":
        from lorastack.cli.application import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
