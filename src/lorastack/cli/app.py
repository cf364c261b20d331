"""The application: its name, its help, its subcommands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from lorastack import __version__
from lorastack.cli.apply import apply
from lorastack.cli.bake import bake
from lorastack.cli.compare import compare_command
from lorastack.cli.console import saying
from lorastack.cli.inspect import inspect_command
from lorastack.cli.merge import merge_command
from lorastack.cli.report import report
from lorastack.cli.resize import resize
from lorastack.cli.run import run
from lorastack.cli.tune import tune
from lorastack.files.output import LOG
from lorastack.ways import command_line

app = typer.Typer(
    name="lorastack",
    help="Compose LoRA adapters of any format: stack them with scales and apply the sum.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    if command := commands.get(context.invoked_subcommand):
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        context.with_resource(command_line(flags))  # errors speak of what this command has
    context.with_resource(saying(LOG))


_COMMANDS: dict[str, Callable[..., None]] = {
    "apply": apply,
    "bake": bake,
    "compare": compare_command,
    "inspect": inspect_command,
    "merge": merge_command,
    "report": report,
    "resize": resize,
    "run": run,
    "tune": tune,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
