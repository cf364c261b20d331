"""``lorastack compare``: what adapters do and how they get on with each other, as tables or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorastack.algebra.compare import INTRUDERS, SIGN_SAMPLES, Comparison, IntruderSearch, compare, verdict
from lorastack.algebra.measure import WeightMeasure
from lorastack.base import open_base
from lorastack.cli.console import echo_json, plain
from lorastack.cli.options import AllowMixedBases, Base, Ignore, Rename, parse_renames
from lorastack.cli.progress import step_bar
from lorastack.formats.gguf import open_reader
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.mixture import parse_entry
from lorastack.recipe import Recipe

#: Columns of the matrix, and rows of the table of pairs; JSON has all.
_WIDEST = 12
_PAIRS = 20
_COLOURS = {"pile up": "yellow", "cancel": "red", "independent": "green", "no effect": "dim"}


def compare_command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:SCALE]...",
            help="As for `bake`; a folder that holds several adapters means all of them.",
            show_default=False,
        ),
    ],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every number of every pair.")] = False,
    by_weight: Annotated[bool, typer.Option("--weights", help="Also the numbers of each weight.")] = False,
    intruders: Annotated[
        bool,
        typer.Option(
            "--intruders/--no-intruders",
            help="With a base: look for intruder dimensions. It decomposes every weight that is changed, which takes "
            "seconds to minutes for each the first time.",
        ),
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the base's singular vectors below ~/.cache/lorastack/svd.")
    ] = True,
    all_signs: Annotated[
        bool, typer.Option("--all-signs", help="Compare signs at every entry, also where a sample would do.")
    ] = False,
    allow_mixed_bases: AllowMixedBases = False,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Say what adapters do and whether they cancel or pile up: norms, ranks, angles, overlaps, signs, near-duplicates.

    With `--base`, norms are also given relative to the base's weights, intruder dimensions are looked for, and GGUF and
    PEFT adapters can be compared with each other. Everything is computed from the factors; `docs/compare.md` says what
    each number means.

    Examples:

    `lorastack compare zara.gguf:0.7 excited.gguf:0.3`

    `lorastack compare ./my-adapters --json`

    `lorastack compare zara.gguf ./robot --base ./my-model --weights`
    """
    recipe = Recipe.of_words(_several(adapters), base)
    model = open_base(recipe.base) if recipe.base else None
    stack = recipe.stack(
        base=model, naming=model.naming if model else None, ignore=ignore or (), rename=parse_renames(rename)
    )
    search = IntruderSearch(INTRUDERS.leading, INTRUDERS.epsilon, cache) if intruders else None
    done = 0
    with step_bar("comparing") as bar:

        def step(count: int) -> None:
            nonlocal done
            done += count
            bar(done, len(stack.weights))

        samples = None if all_signs else SIGN_SAMPLES
        found = compare(
            stack,
            model,
            intruders=search,
            sign_samples=samples,
            allow_mixed_bases=allow_mixed_bases,
            progress=step,
        )
    if as_json:
        echo_json(found.to_dict(by_weight))
        return
    _print(found, Console(highlight=False), by_weight)


def _several(words: list[str]) -> Iterator[str]:
    """The words, with a folder of adapters replaced by those, each at the folder's scale."""
    for word in words:
        path, scale = parse_entry(word)
        inside = _adapters_in(Path(path))
        yield from (f"{one}:{scale!r}" for one in inside) if inside else [word]


def _adapters_in(folder: Path) -> list[Path]:
    """The PEFT folders below a folder that is none itself, and the GGUF files in it that are no whole model."""
    if not folder.is_dir() or (folder / CONFIG_NAME).is_file():
        return []
    files = [path for path in sorted(folder.glob("*.gguf")) if not _is_model(path)]
    return sorted(path.parent for path in folder.glob(f"*/**/{CONFIG_NAME}")) + files


def _is_model(path: Path) -> bool:
    kind = open_reader(path, max_elements=1 << 22).fields.get("general.type")
    return kind is None or kind.contents() == "model"


def _print(found: Comparison, console: Console, by_weight: bool) -> None:
    console.print(_adapters(found))
    if by_weight:
        console.print(_weights(found))
    if len(found.names) > 2:
        console.print(_matrix(found))
    if len(found.names) > 1:
        console.print(_pairs(found))
        console.print(f"all together: norm {found.norm:.4g}, {_number(found.total_pileup)} of the sum of their norms")
    if not found.signs_exact:
        console.print(f"signs were compared at a sample of {found.sign_entries:,} entries; --all-signs looks at all")
    for one in found.near_duplicates:
        console.print(
            f"[yellow]near-duplicates:[/] {plain(one.first)} and {plain(one.second)}, cosine {one.cosine:.4f}, "
            f"the second {one.ratio:.3g} times as strong",
            soft_wrap=True,
        )
    for adapter in found.adapters:
        for line in adapter.left_out:
            console.print(f"[yellow]{plain(adapter.name)}: left out of account:[/] {plain(line)}", soft_wrap=True)


def _adapters(found: Comparison) -> Table:
    table = Table("adapter", "scale", "weights", "norm", "of the base", "stable rank", "effective rank", "intruders",
                  "changes most")  # fmt: skip
    for one in found.adapters:
        table.add_row(
            plain(one.name),
            f"{one.scale:g}",
            str(len(one.weights)),
            f"{one.norm:.4g}",
            _share(one.relative),
            f"{one.stable_rank:.2f}",
            f"{one.effective_rank:.2f}",
            "-" if one.intruders is None else f"{one.intruders} of {one.examined}",
            plain(", ".join(weight.name.removesuffix(".weight") for weight in one.strongest(2))),
        )
    return table


def _weights(found: Comparison) -> Table:
    table = Table("weight", "adapter", "shape", "rank", "norm", "of the base", "strongest direction", "stable rank",
                  "effective rank", "intruders")  # fmt: skip
    at: dict[str, list[tuple[str, WeightMeasure]]] = {name: [] for name in found.weights}
    for adapter in found.adapters:
        for one in adapter.weights:
            at[one.name].append((adapter.name, one))
    for name, measures in at.items():
        for adapter_name, one in measures:
            table.add_row(
                plain(name),
                plain(adapter_name),
                " x ".join(map(str, one.shape)),
                str(one.rank),
                f"{one.norm:.4g}",
                _share(one.relative),
                f"{one.spectrum[0] if one.spectrum else 0:.4g}",
                f"{one.stable_rank:.2f}",
                f"{one.effective_rank:.2f}",
                "-" if one.intruders is None else f"{one.intruders} of {one.examined}",
            )
    return table


def _matrix(found: Comparison) -> Table:
    shown = min(len(found.names), _WIDEST)
    title = (
        "cosine" if shown == len(found.names) else f"cosine, the first {shown} of {len(found.names)}; --json has all"
    )
    table = Table("", *(plain(name) for name in found.names[:shown]), title=title, title_justify="left")
    for n in range(shown):
        table.add_row(plain(found.names[n]), *(_number(value) for value in found.cosine[n, :shown]))
    return table


def _pairs(found: Comparison) -> Table:
    count = len(found.names)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    # What matters for the sum comes first; a pair of which one does nothing comes last.
    pairs.sort(key=lambda pair: -abs(found.cosine[pair]) if not math.isnan(found.cosine[pair]) else 1.0)
    title = f"the {_PAIRS} pairs of {len(pairs)} that matter most; --json has all" if len(pairs) > _PAIRS else "pairs"
    table = Table("pair", "added, they", "cosine", "sum / norms", "reads alike (by chance)", "writes alike (by chance)",
                  "sign conflict", title=title, title_justify="left")  # fmt: skip
    for pair in pairs[:_PAIRS]:
        word = verdict(float(found.cosine[pair]))
        table.add_row(
            plain(f"{found.names[pair[0]]} + {found.names[pair[1]]}"),
            f"[{_COLOURS[word]}]{_DO[word]}[/]",
            _number(found.cosine[pair]),
            _number(found.pileup[pair]),
            f"{_number(found.in_overlap[pair])} ({_number(found.in_chance[pair])})",
            f"{_number(found.out_overlap[pair])} ({_number(found.out_chance[pair])})",
            "-" if math.isnan(found.sign_conflict[pair]) else f"{found.sign_conflict[pair]:.1%}",
        )
    return table


_DO = {"pile up": "pile up", "cancel": "cancel", "independent": "are independent", "no effect": "have no effect"}


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
