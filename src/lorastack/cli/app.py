"""The application and the options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack import __version__

app = typer.Typer(
    name="lorastack",
    help="Compose LoRA adapters of any format: stack them with scales and apply the sum.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER[:SCALE]...",
        help="GGUF files, PEFT folders or hub ids (owner/name), each with a scale: `zara:0.7`. No scale means 1.",
        show_default=False,
    ),
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the adapters through.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD", help="A field of adapter_config.json to leave out of account; may be repeated."),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an output that exists.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lorastack {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compose LoRA adapters of any format: stack them with scales and apply the sum."""


# Importing a subcommand registers it.
from lorastack.cli import apply as _apply  # noqa: E402, F401
