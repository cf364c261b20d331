"""Arguments and options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
    typer.Option(
        metavar="FIELD",
        help="A field of adapter_config.json, or a file beside the adapter, to leave out of account; may be repeated.",
    ),
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
