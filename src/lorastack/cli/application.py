"""The application: its name, its help, and what holds while any subcommand runs."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack import __version__
from lorastack.cli.console import be_quiet, saying
from lorastack.cli.group import SETTINGS, Group
from lorastack.ways import command_line

app = typer.Typer(
    name="lorastack",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lorastack {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compose LoRA adapters of any format: stack them with scales and apply the sum."""
    commands = context.command.commands  # type: ignore[attr-defined]
    be_quiet(False)
    if command := commands.get(context.invoked_subcommand):
        from lorastack.files.output import LOG

        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        context.with_resource(command_line(flags))  # errors speak of what this command has
        context.with_resource(saying(LOG))
