"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.console import be_quiet
from lorastack.errors import ArgumentError


def _types() -> list[str]:
    from lorastack.core.dtypes import NAMES

    return list(NAMES)


def _formats() -> list[str]:
    from typing import get_args

    from lorastack.formats.writers import Format

    return list(get_args(Format))


def _methods() -> list[str]:
    from lorastack.algebra.method import METHODS

    return list(METHODS)


def _programs() -> list[str]:
    from lorastack.targets import PROGRAMS

    return list(PROGRAMS)


Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER[:SCALE]...",
        help="Files or folders of any format, hub ids (owner/name), recipes (.toml), or folders that hold several; "
        "each with a scale, as in `zara:0.7`, which is else 1, and perhaps a name, as in `hers=zara.gguf:0.7`.",
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
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Another front for weights' names, as in model=model.language_model; may be repeated.",
    ),
]
LokrRank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Cut LoKr updates of two full factors, which no low rank holds, to this rank; `inspect` says the error.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        "-b",
        metavar="BASE",
        help="The base model: a folder, a hub id, a GGUF file, or a checkpoint of Stable Diffusion.",
    ),
]
AdapterOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="NAME.gguf for a GGUF adapter, NAME.safetensors for one in its own format, else a folder for PEFT.",
    ),
]
FileFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        autocompletion=_formats,
        help="gguf, peft, kohya, comfyui, diffusers or mlx; the output's ending says it when not given.",
    ),
]
Program = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="PROGRAM",
        autocompletion=_programs,
        help="The program that will read it: vllm, sglang, tensorrt-llm, lorax, llama.cpp, ollama, comfyui, mlx-lm",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        autocompletion=_methods,
        help="How adapters become one: cat or linear (the weighted sum), svd, or a rule in a space such as ties@knots.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(metavar="D", help="The part of entries that rules keep; 0.2 for ties, 0.5 for dare."),
]
AllowMixedBases = Annotated[
    bool,
    typer.Option("--allow-mixed-bases", help="Take adapters together that name different bases or share no weight."),
]
StoredType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=_types,
        help="f32, f16, bf16, or for GGUF q8_0; factors keep theirs when not given.",
    ),
]
ModelType = Annotated[
    str,
    typer.Option(
        metavar="TYPE", autocompletion=lambda: ["auto", *_types()[:3]], help="The base's: auto, f32, f16 or bf16."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
        help="auto, cpu, cuda, mps, ...",
    ),
]
NoRecipe = Annotated[
    bool,
    typer.Option(
        "--no-recipe",
        help="Leave out of the file what it was made of: sources, which may be paths of this machine, and hashes.",
    ),
]
Figures = Annotated[
    bool,
    typer.Option(
        "--figures",
        help="Draw norms, singular values and cosines into `figures` of a folder, for its card; needs plotly.",
    ),
]
DropExtras = Annotated[
    bool,
    typer.Option(
        "--drop-extras",
        help="Leave out what a low-rank adapter cannot hold: DoRA magnitudes, biases, saved modules.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=be_quiet,
        help="Print only what was asked for: no progress, nothing on what was written.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an output that exists.")]


def check_figures(output: Path) -> None:
    """Refuse, before the work, figures that could not be drawn in the end."""
    from lorastack.cli.missing import require_all
    from lorastack.formats.writers import refuse_figures

    refuse_figures(output)
    require_all("report")


def parse_renames(words: list[str] | None) -> dict[str, str]:
    """``OLD=NEW`` words as a mapping.

    >>> parse_renames(["model=model.language_model", "vision="])
    {'model': 'model.language_model', 'vision': ''}
    """
    wrong = [word for word in words or [] if "=" not in word]
    if wrong:
        raise ArgumentError(f"--rename {wrong[0]!r}: write OLD=NEW, as in model=model.language_model")
    return {word.partition("=")[0]: word.partition("=")[2] for word in words or []}
