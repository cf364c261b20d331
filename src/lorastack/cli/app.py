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
        help="GGUF files, PEFT folders, hub ids (owner/name) or recipes (.toml), each with a scale, as in `zara:0.7`; "
        "no scale means 1.",
        show_default=False,
    ),
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and Inf in the adapters through.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD", help="A field of adapter_config.json to leave out of account; may be repeated."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", metavar="BASE", help="The base model: a Hugging Face folder, hub id or GGUF file."),
]
StoredType = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="f32, f16, bf16, or for GGUF q8_0; factors keep theirs when not given."),
]
DropExtras = Annotated[
    bool,
    typer.Option(
        "--drop-extras",
        help="Leave out what a low-rank adapter cannot hold: DoRA magnitudes, biases, saved modules.",
    ),
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
from lorastack.cli import apply as _apply  # noqa: E402
from lorastack.cli import bake as _bake  # noqa: E402
from lorastack.cli import compare as _compare  # noqa: E402
from lorastack.cli import inspect as _inspect  # noqa: E402
from lorastack.cli import report as _report  # noqa: E402
from lorastack.cli import resize as _resize  # noqa: E402
from lorastack.cli import run as _run  # noqa: E402
from lorastack.cli import tune as _tune  # noqa: E402

__all__ = ["_apply", "_bake", "_compare", "_inspect", "_report", "_resize", "_run", "_tune", "app"]
