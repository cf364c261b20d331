"""``lorastack run``: continue prompts with a base and a stack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorastack.cli.console import echo, echo_json
from lorastack.cli.ending import interrupted_later
from lorastack.cli.options import (
    AllowNonfinite,
    Device,
    DropExtras,
    Ignore,
    LokrRank,
    ModelType,
    Quiet,
    Rename,
    parse_renames,
)
from lorastack.errors import ArgumentError, printable

#: A file of rows, which all become one batch, has less.
MAX_ROWS = 1 << 26

if TYPE_CHECKING:
    from lorastack.torch import Handle


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A Hugging Face folder or hub id, or a GGUF file.")],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER[:SCALE]]...",
            help="Adapters or recipes with their scales, and perhaps names, as in `hers=zara.gguf:0.7`.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; several make a batch.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIXTURE|TEXT",
            help="A prompt with a mixture of its own, as in `zara:1 excited:0.5 | Once upon a time`; may be repeated. "
            "Or a .jsonl file with lines of prompt and adapters. Names are the adapters' own, in quotes if they have "
            "spaces; none is the base.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the tokens that make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 is all.")] = 50,
    repetition_penalty: Annotated[float, typer.Option(min=0, help="Above 1 avoids what was said.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the base's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message, with --chat.")] = None,
    dtype: ModelType = "auto",
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, once all is written: prompt, adapters and text of each.")
    ] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out adapter weights that the base has no module for.")
    ] = False,
    drop_extras: DropExtras = False,
    allow_nonfinite: AllowNonfinite = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    quiet: Quiet = False,
) -> None:
    """Continue prompts with a base and a weighted stack of adapters; the text is printed as it comes.

    Examples:

    `lorastack run ./my-model zara.gguf:0.7 ./robot:0.3 -p "Once upon a time"`

    `lorastack run base.gguf zara.gguf excited.gguf --rows "zara:1 | One day" --rows "excited:0.5 zara:0.5 | One day"`

    `lorastack run org/chat-model ./style:0.8 --chat -p "Tell me a story" -t 0.8 --seed 1`
    """
    from lorastack.cli.missing import require_all
    from lorastack.recipe import Recipe

    asked = [(None, text) for text in prompt or []] + [pair for row in rows or [] for pair in parse_rows(row)]
    if not asked:
        raise ArgumentError('there is nothing to continue; give a prompt with -p "TEXT", or rows with --rows')
    if prompt and rows:
        raise ArgumentError("give -p for prompts under the whole stack, or --rows for mixtures of their own, not both")
    if rows and not adapters:
        raise ArgumentError("--rows mixes adapters by name; name the adapter files after the base")
    require_all("torch")
    with interrupted_later():
        import torch

        from lorastack.torch import attach_all
        from lorastack.torch.generate import encode, generate, load_base

    recipe = Recipe.of_words(adapters or [], base)
    entries = recipe.entries(
        allow_nonfinite=allow_nonfinite,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
        drop_extras=drop_extras,
    )
    model, tokenizer = load_base(base, dtype, device)
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": temperature > 0,
                               "repetition_penalty": repetition_penalty}  # fmt: skip
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    handle = None
    if entries:
        handle = attach_all(model, entries, allow_partial=allow_partial)
        for name, lines in handle.report.missing.items():
            echo(f"{name}: left out {len(lines)} weights, such as: {lines[0]}", err=True)
    inputs = encode(tokenizer, [text for _, text in asked], chat, system)
    if len(asked) == 1 and num_beams == 1 and not rows and not as_json:
        from transformers import TextStreamer

        if not chat:
            echo(asked[0][1], end="", prose=True)

        class Shown(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                echo(text, end="\n" if stream_end else "", prose=True)  # a model may write what a terminal obeys

        streamer = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate(model, tokenizer, inputs, handle, streamer=streamer, **options)
        _say_unused(handle)
        return
    mixtures = [mixture or {} for mixture, _ in asked] if rows else None
    found = list(zip(asked, generate(model, tokenizer, inputs, handle, mixtures, **options), strict=True))
    if as_json:
        scales = dict(handle.scales) if handle else {}
        echo_json(
            [{"prompt": text, "adapters": mixture if rows else scales, "text": more} for (mixture, text), more in found]
        )
        _say_unused(handle)
        return
    for (mixture, text), more in found:
        if rows:
            said = " ".join(f"{name}:{scale:g}" for name, scale in (mixture or {}).items()) or "base"
            typer.secho(printable(f"[{said}]"), bold=True)
        echo(more.strip() if chat else text + more, prose=True)
    _say_unused(handle)


def _say_unused(handle: Handle | None) -> None:
    """Say at which weights the model was not changed: an adapter without effect would look like a weak one."""
    if handle is not None and (unused := handle.unused()):
        echo(f"warning: {unused}", err=True)


def parse_rows(word: str) -> list[tuple[dict[str, float] | None, str]]:
    """``MIXTURE | TEXT``, or the lines of a ``.jsonl`` file, as (mixture, prompt).

    >>> parse_rows("zara:1 excited:0.5 | Once upon a time"), parse_rows("| Hello")
    ([({'zara': 1.0, 'excited': 0.5}, 'Once upon a time')], [({}, 'Hello')])
    """
    if word.endswith(".jsonl"):
        return _rows_of_file(Path(word))
    names, bar, text = word.partition("|")
    if not bar or not text.strip():
        raise ArgumentError(f"{word!r} is no row; write MIXTURE | TEXT, as in 'zara:1 excited:0.5 | Once upon a time'")
    from lorastack.mixture import parse_mixture

    return [(parse_mixture(names), text.strip())]


def _rows_of_file(path: Path) -> list[tuple[dict[str, float] | None, str]]:
    import orjson

    from lorastack.files import read_regular

    found: list[tuple[dict[str, float] | None, str]] = []
    lines = read_regular(path, MAX_ROWS, ArgumentError).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            said = orjson.loads(line) if line.strip() else None
            if said is not None:
                scales = {str(name): float(scale) for name, scale in said.get("adapters", {}).items()}
                if not isinstance(said["prompt"], str) or not all(map(math.isfinite, scales.values())):
                    raise ValueError("prompt is a text, scales are finite numbers")
                found.append((scales, said["prompt"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArgumentError(
                f'{path}, line {number}: expected {{"prompt": "...", "adapters": {{"zara": 1.0}}}} ({error})'
            ) from error
    return found
