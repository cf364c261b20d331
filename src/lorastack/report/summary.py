"""Summary: what a report says first, as texts that are no HTML and no Markdown yet."""

from __future__ import annotations

from lorastack.algebra.compare import MATTERS
from lorastack.report import words
from lorastack.report.findings import Findings
from lorastack.report.selection import Pair, pairs_of
from lorastack.report.words import count, number, of_cosine, percent


def summary(found: Findings) -> str:
    """The first paragraph: how much is changed, how two get on, what a bake would lose."""
    comparison, grid = found.comparison, found.grid
    many = len(found.adapters)
    layers = len([layer for layer in grid.layers if layer.isdigit()])
    where = count(len(comparison.weights), "weight") + (f" in {count(layers, 'layer')}" if layers else "")
    said = [
        f"{many} adapters change {where}" if many > 1 else f"One adapter changes {where}",
        f" of {found.base}." if found.base else ".",
    ]
    if many > 1:
        said.append(
            f" Added at these scales, their sum has the norm {number(comparison.norm)}, "
            f"{percent(comparison.total_pileup)} of what their norms add up to "
            f"({percent(comparison.independent_pileup)} if they were independent)."
        )
        first = pairs_of(found)[0]
        both = f"{comparison.names[first.i]} and {comparison.names[first.j]}"
        which = "" if many == 2 else "The pair that matters most: "
        said.append(f" {which}{both} have a cosine of {words.cosine(first.cosine)}: {of_cosine(first.cosine)}.")
        said.append(_by_weight(found, first))
    lossy = [one for one in found.bakes if one.rank < found.exact]
    if lossy:
        bake = next((one for one in lossy if one.error < 0.01), lossy[-1])
        said.append(f" A bake at rank {bake.rank} loses {percent(bake.error)} of it; rank {found.exact} loses nothing.")
    else:
        said.append(f" A bake into one adapter of rank {found.exact} loses nothing.")
    return "".join(said)


def notes(found: Findings) -> list[str]:
    """What stands below it: what is in no number, and adapters that are nearly the same."""
    comparison = found.comparison
    lines = [
        f"{comparison.names[n]}: not in any number here: {line}"
        for n, one in enumerate(comparison.adapters)
        for line in one.left_out
    ]
    return lines + [
        f"{a} and {b} are near duplicates (cosine {cosine:.4f}): one of them, scaled by {number(1 + ratio)}, does the "
        "same"
        for a, b, cosine, ratio in comparison.near_duplicates
    ]


def _by_weight(found: Findings, pair: Pair) -> str:
    """What the one number of a pair hides: it can be 0 where half of the weights cancel and half pile up."""
    if found.comparison.by_weight is None:
        return ""
    cosines = found.comparison.by_weight.cosine[:, pair.i, pair.j]
    down, up = int((cosines < -MATTERS).sum()), int((cosines > MATTERS).sum())
    parts = [f"cancel at {down}"] * bool(down) + [f"pile up at {up}"] * bool(up)
    return f" Weight by weight, they {' and '.join(parts)} of {len(cosines)}." if parts else ""
