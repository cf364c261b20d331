"""Sections: what a page says in words and tables, with the figures where they belong."""

from __future__ import annotations

import html
import math
from itertools import combinations
from typing import NamedTuple

from lorastack.algebra.compare import MATTERS
from lorastack.algebra.measure import AdapterMeasure
from lorastack.algebra.pairs import independent_pileup
from lorastack.hub import told
from lorastack.inspect import Inspection
from lorastack.report import curves, heat, words
from lorastack.report.figures import Drawing
from lorastack.report.findings import BakeLoss, Findings
from lorastack.report.parts import alone, gallery, listing, section, table
from lorastack.report.places import split
from lorastack.report.words import count, few, number, of_cosine, of_error, of_overlap, of_pileup, percent

#: So many adapters, pairs and weights are shown one by one; the page says when there are more.
_MOST = 8

_text = html.escape


class Pair(NamedTuple):
    """Two adapters by number, and how alike they are."""

    i: int
    j: int
    cosine: float


def sections(found: Findings) -> str:
    """The body of the page."""
    parts = [_summary(found), _adapters(found), _places(found), _spectra(found)]
    if len(found.adapters) > 1:
        parts += [_similarity(found), _conflicts(found)]
    parts += [_bakes(found), _recipe(found)]
    return "\n".join(parts)


def _summary(found: Findings) -> str:
    comparison, grid = found.comparison, found.grid
    many = len(found.adapters)
    layers = len([layer for layer in grid.layers if layer.isdigit()])
    where = count(len(comparison.weights), "weight") + (f" in {count(layers, 'layer')}" if layers else "")
    said = [
        f"{many} adapters change {where}" if many > 1 else f"One adapter changes {where}",
        f" of {_text(found.base)}." if found.base else ".",
    ]
    if many > 1:
        said.append(
            f" Added at these scales, their sum has the norm {number(comparison.norm)}, "
            f"{percent(comparison.total_pileup)} of what their norms add up to "
            f"({percent(comparison.independent_pileup)} if they were independent)."
        )
        first = _pairs(found)[0]
        both = f"{_name(found, first.i)} and {_name(found, first.j)}"
        which = "" if many == 2 else "The pair that matters most: "
        said.append(f" {which}{both} have a cosine of {words.cosine(first.cosine)}: {of_cosine(first.cosine)}.")
        said.append(_by_weight(found, first))
    lossy = [one for one in found.bakes if one.rank < found.exact]
    if lossy:
        bake = next((one for one in lossy if one.error < 0.01), lossy[-1])
        said.append(f" A bake at rank {bake.rank} loses {percent(bake.error)} of it; rank {found.exact} loses nothing.")
    else:
        said.append(f" A bake into one adapter of rank {found.exact} loses nothing.")
    notes = [
        f"{_name(found, n)}: not in any number here: {_text(line)}"
        for n, one in enumerate(comparison.adapters)
        for line in one.left_out
    ]
    notes += [
        f"{_text(a)} and {_text(b)} are near duplicates (cosine {cosine:.4f}): one of them, scaled by "
        f"{number(1 + ratio)}, does the same"
        for a, b, cosine, ratio in comparison.near_duplicates
    ]
    return f'<p class="lead">{"".join(said)}</p>' + listing(notes)


def _by_weight(found: Findings, pair: Pair) -> str:
    """What the one number of a pair hides: it can be 0 where half of the weights cancel and half pile up."""
    if found.comparison.by_weight is None:
        return ""
    cosines = found.comparison.by_weight.cosine[:, pair.i, pair.j]
    down, up = int((cosines < -MATTERS).sum()), int((cosines > MATTERS).sum())
    parts = [f"cancel at {down}"] * bool(down) + [f"pile up at {up}"] * bool(up)
    return f" Weight by weight, they {' and '.join(parts)} of {len(cosines)}." if parts else ""


def _adapters(found: Findings) -> str:
    columns = ["adapter", "scale", "format", "trained on", "rank", "alpha", "weights", "parameters", "norm"]
    with_base = found.comparison.adapters[0].relative is not None
    if with_base:
        columns.append("share of base")
    columns += ["directions used", "strongest at"]
    searched = any(one.examined is not None for one in found.comparison.adapters)
    if searched:
        columns.append("intruders")
    rows = [
        _row(one, measured, with_base, searched)
        for one, measured in zip(found.adapters, found.comparison.adapters, strict=True)
    ]
    said = (
        "Norms are those of the update as added: scale · alpha/rank · B·A. Directions used are the effective rank, a "
        "mean over the weights: far below the rank, the adapter could be smaller."
    )
    if with_base:
        said += " The share of base is the norm over that of the base's weights which it changes."
    if searched:
        said += (
            " Intruders are leading directions of a changed weight that are none of the base's: with many of them an "
            "adapter tends to forget more of what the base knew."
        )
    odd = [
        f"{_text(measured.name)}: {_text(line)}"
        for one, measured in zip(found.adapters, found.comparison.adapters, strict=True)
        for line in one.odd
        if line not in measured.left_out
    ]
    return section("The adapters", said, table("What each adapter is", columns, rows), listing(odd))


def _row(one: Inspection, measured: AdapterMeasure, with_base: bool, searched: bool) -> list[str]:
    strongest = measured.strongest(1)
    cells = [
        measured.name,
        f"{measured.scale:g}",
        one.format,
        _base(one),
        few(one.ranks),
        "–" if one.alpha is None else f"{one.alpha:g}",
        f"{one.weights}",
        f"{one.parameters:,}",
        number(measured.norm),
    ]
    if with_base:
        cells.append(percent(measured.relative))
    cells += [number(measured.effective_rank, 2), _short(strongest[0].name) if strongest else "–"]
    if searched:
        cells.append("–" if measured.examined is None else f"{measured.intruders} of {measured.examined}")
    return cells


def _base(one: Inspection) -> str:
    """What an adapter says it was trained on; of a folder only its name."""
    return told(one.base) if one.base else one.architecture or "not said"


def _places(found: Findings) -> str:
    comparison, grid = found.comparison, found.grid
    shown = _strongest(found)
    relative = comparison.adapters[0].relative is not None
    top = heat.norm_top([comparison.adapters[n] for n in shown], comparison.weights, grid)
    drawn = [(comparison.names[n], heat.norms(comparison.adapters[n], comparison.weights, grid, top)) for n in shown]
    what = "as a share of the norm of the base's weight" if relative else "its Frobenius norm, at its scale"
    said = f"The size of the update at each module and layer, {what}."
    if any(isinstance(one, Drawing) for _, one in drawn):
        said += " One colour scale for all; empty places are not touched."
    return section("Where they change the model", said + _more(found, len(shown)), gallery(drawn))


def _spectra(found: Findings) -> str:
    shown = _strongest(found)
    comparison = found.comparison
    drawn = [
        (comparison.names[n], curves.spectrum(comparison.adapters[n], comparison.weights, found.grid)) for n in shown
    ]
    said = "The singular values of the updates, the root mean square over the layers."
    if any(isinstance(one, Drawing) for _, one in drawn):
        said = (
            "The singular values of the updates, the largest first, on a logarithmic scale; the root mean square over "
            "the layers. A line that falls steeply uses few directions and loses little at a lower rank; a flat one "
            "needs all it has."
        )
    return section("Spectra", said + _more(found, len(shown)), gallery(drawn))


def _similarity(found: Findings) -> str:
    comparison = found.comparison
    pairs = _pairs(found)
    rows = []
    for i, j, cosine in pairs[:_MOST]:
        rows.append(
            [
                f"{comparison.names[i]} + {comparison.names[j]}",
                words.cosine(cosine),
                of_cosine(cosine),
                of_pileup(comparison.pileup[i, j], _independent(found, i, j)),
                of_overlap(comparison.in_overlap[i, j], comparison.in_chance[i, j]),
                of_overlap(comparison.out_overlap[i, j], comparison.out_chance[i, j]),
                percent(comparison.sign_conflict[i, j]),
            ]
        )
    columns = ["pair", "cosine", "in words", "norm kept", "reads alike", "writes alike", "signs differ"]
    said = (
        "The cosine of two updates: 1 is the same direction, 0 is independent, −1 is the opposite. Adapters may share "
        "spaces (read the same inputs, write to the same outputs) and still be independent."
    )
    if len(pairs) > _MOST:
        said += f" The {_MOST} pairs of {len(pairs)} with the largest cosines are listed."
    legend = (
        "Norm kept: the norm of the sum over the sum of the norms, and what it would be for these norms if the two "
        "were independent; less where they cancel. Signs differ: of the entries that both change; independent updates "
        "have 50 %."
    )
    if not comparison.signs_exact:
        legend += f" Signs were compared at {comparison.sign_entries:,} entries."
    matrix = alone("Cosine", heat.similarity(comparison))
    pairs_table = table("Pairs of adapters", columns, rows)
    return section("How alike they are", said, matrix, pairs_table, f'<p class="soft">{legend}</p>')


def _conflicts(found: Findings) -> str:
    comparison, grid = found.comparison, found.grid
    by_weight = comparison.by_weight
    title = "Where they conflict"
    if by_weight is None:
        return section(title, "With so many adapters, pairs are compared over all weights only.")
    cancelling = sorted(
        (float(by_weight.cosine[n, i, j]), weight, i, j)
        for n, weight in enumerate(comparison.weights)
        for i, j in combinations(range(len(found.adapters)), 2)
        if by_weight.cosine[n, i, j] < -MATTERS
    )
    at = {weight: n for n, weight in enumerate(comparison.weights)}
    rows = [
        [
            weight,
            f"{comparison.names[i]} + {comparison.names[j]}",
            words.cosine(cosine),
            of_cosine(cosine),
            of_pileup(by_weight.pileup[at[weight], i, j], _independent(found, i, j, weight)),
            percent(by_weight.sign_conflict[at[weight], i, j]),
        ]
        for cosine, weight, i, j in cancelling[:_MOST]
    ]
    several = len(found.adapters) > 2
    if not cancelling:
        said = f"No weight has a cosine below −{MATTERS}: nothing cancels."
    else:
        what = "weights, counted for each pair," if several else "weights"
        said = f"{len(cancelling)} {what} have a cosine below −{MATTERS}"
        if len(cancelling) == 1:
            said = f"One weight has a cosine below −{MATTERS}"
        said += f"; the {_MOST} worst are listed." if len(cancelling) > _MOST else "."
    pairs = [pair for pair in _pairs(found) if math.isfinite(pair.cosine)]
    numbers = [by_weight.cosine[:, i, j] for i, j, _ in pairs[:_MOST]]
    # One scale for all; not narrower than what is worth a look, so that noise does not glow.
    top = max([0.3, *(float(abs(c)) for one in numbers for c in one if math.isfinite(c))])
    drawn = [
        (f"{comparison.names[i]} and {comparison.names[j]}", heat.cosines(one, grid, top))
        for (i, j, _), one in zip(pairs, numbers, strict=False)
    ]
    if len(pairs) > _MOST:
        said += f" The {_MOST} most alike or most opposed pairs of {len(pairs)} are shown."
    columns = ["weight", "pair", "cosine", "in words", "norm kept", "signs differ"]
    colours = ": blue piles up, red cancels" if any(isinstance(one, Drawing) for _, one in drawn) else ""
    said = f"The cosine at each module and layer{colours}. {said}"
    return section(title, said, gallery(drawn), table("Weights that cancel", columns, rows) if rows else "")


def _bakes(found: Findings) -> str:
    def cells(bake: BakeLoss) -> list[str]:
        if bake.error < 1e-6:
            return [f"rank {bake.rank}", "0 %", of_error(0.0), "–", f"{bake.parameters:,}"]
        worst = f"{percent(bake.worst_error)} at {bake.worst}"
        return [f"rank {bake.rank}", percent(bake.error), of_error(bake.error), worst, f"{bake.parameters:,}"]

    columns = ["bake at", "relative error", "in words", "worst weight", "parameters"]
    whole = "the sum" if len(found.adapters) > 1 else "the adapter"
    said = (
        f"The norm of the difference between {whole} and its best approximation at a rank, over the norm of {whole}. "
        f"Every weight gets that rank. {whole[0].upper()}{whole[1:]} has rank {found.exact}: from there on nothing is "
        "lost."
    )
    if any(one.left_out for one in found.comparison.adapters):
        said += (
            " What is not low-rank is not in it: <code>bake</code> leaves it out only with <code>--drop-extras</code>."
        )
    curve = alone("Relative error", curves.losses(found))
    if len(found.bakes) == 1:
        size = f"<p>A file of rank {found.exact} has {found.bakes[0].parameters:,} parameters.</p>"
    else:
        size = table("What a bake loses", columns, [cells(bake) for bake in found.bakes])
    return section("What a bake would lose", said, curve, size)


def _recipe(found: Findings) -> str:
    said = (
        "The recipe: save it as <code>recipe.toml</code>; every <code>lorastack</code> command takes it as an adapter, "
        "and refuses files that are not these."
    )
    text = f'<details class="paper"><summary>Recipe (TOML)</summary><pre>{_text(found.recipe)}</pre></details>'
    return section("How to make it", said, text)


def _short(weight: str) -> str:
    """Where a weight is: its name is long, and its beginning the same for all."""
    _, layer, module = split(weight)
    return module if layer is None else f"{module}, layer {layer}"


def _pairs(found: Findings) -> list[Pair]:
    """Every pair, those that matter most first."""
    cosine = found.comparison.cosine
    pairs = [Pair(i, j, float(cosine[i, j])) for i, j in combinations(range(len(found.adapters)), 2)]
    return sorted(pairs, key=lambda pair: -abs(pair.cosine) if math.isfinite(pair.cosine) else 1.0)


def _strongest(found: Findings) -> list[int]:
    """The adapters that are drawn one by one, in the stack's order."""
    adapters = found.comparison.adapters
    return sorted(sorted(range(len(adapters)), key=lambda n: -adapters[n].norm)[:_MOST])


def _independent(found: Findings, i: int, j: int, weight: str | None = None) -> float:
    """What two adapters would keep of their norms if they were independent, over all weights or at one."""
    pair = (found.comparison.adapters[i], found.comparison.adapters[j])
    if weight is None:
        return independent_pileup(one.norm for one in pair)
    return independent_pileup(at.norm for one in pair for at in one.weights if at.name == weight)


def _more(found: Findings, shown: int) -> str:
    return f" The {shown} strongest of {len(found.adapters)} are shown." if shown < len(found.adapters) else ""


def _name(found: Findings, n: int) -> str:
    return _text(found.comparison.names[n])
