"""Tables: what a report says in columns and rows, as texts that are no HTML and no Markdown yet."""

from __future__ import annotations

from typing import NamedTuple

from lorastack.algebra.measure import AdapterMeasure
from lorastack.hub import told
from lorastack.inspect import Inspection
from lorastack.report import words
from lorastack.report.findings import BakeLoss, Findings
from lorastack.report.places import split
from lorastack.report.selection import MOST, Cancelling, Pair, cancelling, independent, pairs_of
from lorastack.report.words import few, number, of_cosine, of_error, of_overlap, of_pileup, percent


class Table(NamedTuple):
    """What it is about, its columns, and its rows."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def adapters(found: Findings) -> Table:
    """What each adapter is."""
    columns = ["adapter", "scale", "format", "trained on", "rank", "alpha", "weights", "parameters", "norm"]
    measured = found.comparison.adapters
    with_base, searched = has_base(found), was_searched(found)
    columns += ["share of base"] * with_base + ["directions used", "strongest at"] + ["intruders"] * searched
    rows = [_adapter(one, of, with_base, searched) for one, of in zip(found.adapters, measured, strict=True)]
    return Table("What each adapter is", columns, rows)


def pairs(found: Findings) -> Table:
    """How alike the pairs are that matter most."""
    columns = ["pair", "cosine", "in words", "norm kept", "reads alike", "writes alike", "signs differ"]
    return Table("Pairs of adapters", columns, [_pair(found, one) for one in pairs_of(found)[:MOST]])


def conflicts(found: Findings) -> Table:
    """The weights that cancel most; without rows where nothing does."""
    columns = ["weight", "pair", "cosine", "in words", "norm kept", "signs differ"]
    return Table("Weights that cancel", columns, [_conflict(found, one) for one in cancelling(found)[:MOST]])


def bakes(found: Findings) -> Table:
    """What a bake loses at some ranks."""
    columns = ["bake at", "relative error", "in words", "worst weight", "parameters"]
    return Table("What a bake loses", columns, [_bake(one) for one in found.bakes])


def has_base(found: Findings) -> bool:
    """Whether norms are known as a share of the base's."""
    return found.comparison.adapters[0].relative is not None


def was_searched(found: Findings) -> bool:
    """Whether intruder dimensions were looked for."""
    return any(one.examined is not None for one in found.comparison.adapters)


def _adapter(one: Inspection, measured: AdapterMeasure, with_base: bool, searched: bool) -> list[str]:
    strongest = measured.strongest(1)
    cells = [
        measured.name,
        f"{measured.scale:g}",
        one.format,
        # Of a folder only its name: where it lies on a machine is nobody else's business.
        told(one.base) if one.base else one.architecture or "not said",
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


def _pair(found: Findings, pair: Pair) -> list[str]:
    comparison, (i, j, cosine) = found.comparison, pair
    return [
        f"{comparison.names[i]} + {comparison.names[j]}",
        words.cosine(cosine),
        of_cosine(cosine),
        of_pileup(comparison.pileup[i, j], independent(found, i, j)),
        of_overlap(comparison.in_overlap[i, j], comparison.in_chance[i, j]),
        of_overlap(comparison.out_overlap[i, j], comparison.out_chance[i, j]),
        percent(comparison.sign_conflict[i, j]),
    ]


def _conflict(found: Findings, one: Cancelling) -> list[str]:
    comparison, (cosine, n, i, j) = found.comparison, one
    weight, by_weight = comparison.weights[n], comparison.by_weight
    assert by_weight is not None
    return [
        weight,
        f"{comparison.names[i]} + {comparison.names[j]}",
        words.cosine(cosine),
        of_cosine(cosine),
        of_pileup(by_weight.pileup[n, i, j], independent(found, i, j, weight)),
        percent(by_weight.sign_conflict[n, i, j]),
    ]


def _bake(bake: BakeLoss) -> list[str]:
    if bake.error < 1e-6:
        return [f"rank {bake.rank}", "0 %", of_error(0.0), "–", f"{bake.parameters:,}"]
    worst = f"{percent(bake.worst_error)} at {bake.worst}"
    return [f"rank {bake.rank}", percent(bake.error), of_error(bake.error), worst, f"{bake.parameters:,}"]


def _short(weight: str) -> str:
    """Where a weight is: its name is long, and its beginning the same for all."""
    _, layer, module = split(weight)
    return module if layer is None else f"{module}, layer {layer}"
