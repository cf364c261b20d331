"""``lorastack compare``: what adapters do and how they get on with each other, as tables or JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.console import echo_json, plain
from lorastack.cli.options import Adapters, AllowMixedBases, Base, Ignore, LokrRank, Quiet, Rename, parse_renames
from lorastack.errors import ArgumentError

if TYPE_CHECKING:
    from lorastack.algebra.compare import Comparison
    from lorastack.algebra.measure import WeightMeasure
    from lorastack.algebra.share import Runner
    from lorastack.cli.tables import Grid

#: Columns of the matrix, and rows of the table of pairs; JSON has all.
_WIDEST = 12
_PAIRS = 20
_COLOURS = {"pile up": "yellow", "cancel": "red", "independent": "green", "no effect": "dim"}


def compare_command(
    adapters: Adapters,
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
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Share the weights among so many processes; this one when not given."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Share them among the tasks of a Ray cluster: auto, local, or its address."
        ),
    ] = None,
    allow_mixed_bases: AllowMixedBases = False,
    ignore: Ignore = None,
    rename: Rename = None,
    lokr_rank: LokrRank = None,
    quiet: Quiet = False,
) -> None:
    """Say what adapters do and whether they cancel or pile up: norms, ranks, angles, overlaps, signs, near-duplicates.

    With `--base`, norms are also given relative to the base's weights, intruder dimensions are looked for, and GGUF and
    PEFT adapters can be compared with each other. Everything is computed from the factors; `docs/compare.md` says what
    each number means.

    Examples:

    `lorastack compare zara.gguf:0.7 excited.gguf:0.3`

    `lorastack compare ./my-adapters --json`

    `lorastack compare zara.gguf ./robot --base ./my-model --weights`

    `lorastack compare ./thousand-adapters --workers 4 --json`
    """
    from lorastack.algebra.compare import INTRUDERS, SIGN_SAMPLES, IntruderSearch, compare
    from lorastack.cli.progress import step_bar
    from lorastack.recipe import Recipe

    recipe = Recipe.of_words(adapters, base)
    model = recipe.open_base()
    stack = recipe.stack(
        base=model,
        naming=model.naming if model else None,
        ignore=ignore or (),
        rename=parse_renames(rename),
        rank=lokr_rank,
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
            run=_runner(workers, ray),
        )
    if as_json:
        echo_json(found.to_dict(by_weight))
        return
    _print(found, by_weight)


def _runner(workers: int | None, ray: str | None) -> Runner | None:
    from lorastack.fleet.workers import on_ray, processes

    if workers is not None and ray is not None:
        raise ArgumentError("--workers and --ray are two ways to share the work; give one of them")
    return processes(workers) if workers is not None else on_ray(ray) if ray is not None else None


def _print(found: Comparison, by_weight: bool) -> None:
    from rich.console import Console

    from lorastack.cli.tables import show, show_matrix

    console = Console(highlight=False, soft_wrap=True)
    show(_adapters(found))
    if by_weight:
        show(_weights(found))
    if len(found.names) > 2:
        shown = min(len(found.names), _WIDEST)
        cut = "" if shown == len(found.names) else f", the first {shown} of {len(found.names)}; --json has all"
        cells = [[_number(value) for value in found.cosine[n, :shown]] for n in range(shown)]
        show_matrix(found.names[:shown], cells, "cosine" + cut)
    if len(found.names) > 1:
        # Where names are too wide, pairs go by the numbers that stand before the names in the matrix.
        show(_pairs(found), shorter=_pairs(found, numbered=True) if len(found.names) > 2 else None)
        alone = _number(found.independent_pileup)
        console.print(
            f"all together: norm {found.norm:.4g}, {_number(found.total_pileup)} of the sum of their norms "
            f"({alone} if they were independent)"
        )
    if not found.signs_exact:
        console.print(f"signs were compared at a sample of {found.sign_entries:,} entries; --all-signs looks at all")
    for one in found.near_duplicates:
        console.print(
            f"[yellow]near-duplicates:[/] {plain(one.first)} and {plain(one.second)}, cosine {one.cosine:.4f}, "
            f"the second {one.ratio:.3g} times as strong"
        )
    for adapter in found.adapters:
        for line in adapter.left_out:
            console.print(f"[yellow]{plain(adapter.name)}: left out of account:[/] {plain(line)}")


def _adapters(found: Comparison) -> Grid:
    from lorastack.cli.tables import Grid, fixed

    titles = ("adapter", "scale", "weights", "norm", "of the base", "stable rank", "effective rank", "intruders",
              "changes most")  # fmt: skip
    rows = [
        (
            one.name,
            f"{one.scale:g}",
            str(len(one.weights)),
            f"{one.norm:.4g}",
            _share(one.relative),
            fixed(one.stable_rank, 2),
            fixed(one.effective_rank, 2),
            "-" if one.intruders is None else f"{one.intruders} of {one.examined}",
            ", ".join(weight.name for weight in one.strongest(2)),
        )
        for one in found.adapters
    ]
    return Grid(titles, rows, names=[8])


def _weights(found: Comparison) -> Grid:
    from lorastack.cli.tables import Grid, fixed

    titles = ("weight", "adapter", "shape", "rank", "norm", "of the base", "strongest direction", "stable rank",
              "effective rank", "intruders")  # fmt: skip
    at: dict[str, list[tuple[str, WeightMeasure]]] = {name: [] for name in found.weights}
    for adapter in found.adapters:
        for one in adapter.weights:
            at[one.name].append((adapter.name, one))
    rows = [
        (
            name,
            adapter_name,
            " x ".join(map(str, one.shape)),
            str(one.rank),
            f"{one.norm:.4g}",
            _share(one.relative),
            f"{one.spectrum[0] if one.spectrum else 0:.4g}",
            fixed(one.stable_rank, 2),
            fixed(one.effective_rank, 2),
            "-" if one.intruders is None else f"{one.intruders} of {one.examined}",
        )
        for name, measures in at.items()
        for adapter_name, one in measures
    ]
    return Grid(titles, rows, names=[0])


def _pairs(found: Comparison, numbered: bool = False) -> Grid:
    from lorastack.algebra.compare import verdict
    from lorastack.cli.tables import Cell, Grid, fixed

    count = len(found.names)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    # What matters for the sum comes first; a pair of which one does nothing comes last.
    pairs.sort(key=lambda pair: -abs(found.cosine[pair]) if not math.isnan(found.cosine[pair]) else 1.0)
    title = f"the {_PAIRS} pairs of {len(pairs)} that matter most; --json has all" if len(pairs) > _PAIRS else "pairs"
    titles = ("pair", "added, they", "cosine", "sum / norms", "reads alike (by chance)", "writes alike (by chance)",
              "sign conflict")  # fmt: skip
    rows = []
    for pair in pairs[:_PAIRS]:
        word = verdict(float(found.cosine[pair]))
        rows.append(
            (
                f"{pair[0] + 1} + {pair[1] + 1}" if numbered else f"{found.names[pair[0]]} + {found.names[pair[1]]}",
                Cell(_DO[word], _COLOURS[word]),
                _number(found.cosine[pair]),
                _number(found.pileup[pair]),
                f"{_number(found.in_overlap[pair])} ({_number(found.in_chance[pair])})",
                f"{_number(found.out_overlap[pair])} ({_number(found.out_chance[pair])})",
                "-" if math.isnan(found.sign_conflict[pair]) else f"{fixed(100 * found.sign_conflict[pair], 1)}%",
            )
        )
    return Grid(titles, rows, title)


_DO = {"pile up": "pile up", "cancel": "cancel", "independent": "are independent", "no effect": "have no effect"}


def _number(value: float) -> str:
    from lorastack.cli.tables import fixed

    return "-" if math.isnan(value) else fixed(value, 3)


def _share(value: float | None) -> str:
    from lorastack.cli.tables import fixed

    return "-" if value is None else f"{fixed(100 * value, 2)}%"
