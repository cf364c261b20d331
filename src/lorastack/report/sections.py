"""Sections: what a page says in words and tables, with the figures where they belong."""

from __future__ import annotations

import html

from lorastack.algebra.compare import MATTERS
from lorastack.report import drawings, tables
from lorastack.report.drawings import Shown
from lorastack.report.figures import Drawing
from lorastack.report.findings import Findings
from lorastack.report.parts import alone, gallery, listing, section, table
from lorastack.report.selection import MOST, cancelling, pairs_of
from lorastack.report.summary import notes, summary

_text = html.escape


def sections(found: Findings) -> str:
    """The body of the page."""
    parts = [_summary(found), _adapters(found), _places(found), _spectra(found)]
    if len(found.adapters) > 1:
        parts += [_similarity(found), _conflicts(found)]
    parts += [_bakes(found), _recipe(found)]
    return "\n".join(parts)


def _summary(found: Findings) -> str:
    return f'<p class="lead">{_text(summary(found))}</p>' + listing(list(map(_text, notes(found))))


def _adapters(found: Findings) -> str:
    said = (
        "Norms are those of the update as added: scale · alpha/rank · B·A. Directions used are the effective rank, a "
        "mean over the weights: far below the rank, the adapter could be smaller."
    )
    if tables.has_base(found):
        said += " The share of base is the norm over that of the base's weights which it changes."
    if tables.was_searched(found):
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
    return section("The adapters", said, table(*tables.adapters(found)), listing(odd))


def _places(found: Findings) -> str:
    shown = drawings.norms(found)
    relative = tables.has_base(found)
    what = "as a share of the norm of the base's weight" if relative else "its Frobenius norm, at its scale"
    said = f"The size of the update at each module and layer, {what}."
    if _any_drawn(shown):
        said += " One colour scale for all; empty places are not touched."
    return section("Where they change the model", said + _more(found, len(shown)), _gallery(shown))


def _spectra(found: Findings) -> str:
    shown = drawings.spectra(found)
    said = "The singular values of the updates, the root mean square over the layers."
    if _any_drawn(shown):
        said = (
            "The singular values of the updates, the largest first, on a logarithmic scale; the root mean square over "
            "the layers. A line that falls steeply uses few directions and loses little at a lower rank; a flat one "
            "needs all it has."
        )
    return section("Spectra", said + _more(found, len(shown)), _gallery(shown))


def _similarity(found: Findings) -> str:
    comparison = found.comparison
    pairs = pairs_of(found)
    said = (
        "The cosine of two updates: 1 is the same direction, 0 is independent, −1 is the opposite. Adapters may share "
        "spaces (read the same inputs, write to the same outputs) and still be independent."
    )
    if len(pairs) > MOST:
        said += f" The {MOST} pairs of {len(pairs)} with the largest cosines are listed."
    legend = (
        "Norm kept: the norm of the sum over the sum of the norms, and what it would be for these norms if the two "
        "were independent; less where they cancel. Signs differ: of the entries that both change; independent updates "
        "have 50 %."
    )
    if not comparison.signs_exact:
        legend += f" Signs were compared at {comparison.sign_entries:,} entries."
    matrix = "".join(alone(one.title, one.drawing) for one in drawings.cosines(found))
    return section(
        "How alike they are", said, matrix, table(*tables.pairs(found)), f'<p class="soft">{legend}</p>'
    )  # fmt: skip


def _conflicts(found: Findings) -> str:
    title = "Where they conflict"
    if found.comparison.by_weight is None:
        return section(title, "With so many adapters, pairs are compared over all weights only.")
    there = cancelling(found)
    several = len(found.adapters) > 2
    if not there:
        said = f"No weight has a cosine below −{MATTERS}: nothing cancels."
    else:
        what = "weights, counted for each pair," if several else "weights"
        said = f"{len(there)} {what} have a cosine below −{MATTERS}"
        if len(there) == 1:
            said = f"One weight has a cosine below −{MATTERS}"
        said += f"; the {MOST} worst are listed." if len(there) > MOST else "."
    shown = drawings.conflicts(found)
    known = sum(pair.cosine == pair.cosine for pair in pairs_of(found))
    if known > MOST:
        said += f" The {MOST} most alike or most opposed pairs of {known} are shown."
    colours = ": blue piles up, red cancels" if _any_drawn(shown) else ""
    said = f"The cosine at each module and layer{colours}. {said}"
    return section(title, said, _gallery(shown), table(*tables.conflicts(found)) if there else "")


def _bakes(found: Findings) -> str:
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
    curve = "".join(alone(one.title, one.drawing) for one in drawings.losses(found))
    if len(found.bakes) == 1:
        size = f"<p>A file of rank {found.exact} has {found.bakes[0].parameters:,} parameters.</p>"
    else:
        size = table(*tables.bakes(found))
    return section("What a bake would lose", said, curve, size)


def _recipe(found: Findings) -> str:
    said = (
        "The recipe: save it as <code>recipe.toml</code>; every <code>lorastack</code> command takes it as an adapter, "
        "and refuses files that are not these."
    )
    text = f'<details class="paper"><summary>Recipe (TOML)</summary><pre>{_text(found.recipe)}</pre></details>'
    return section("How to make it", said, text)


def _gallery(shown: list[Shown]) -> str:
    return gallery([(one.title, one.drawing) for one in shown])


def _any_drawn(shown: list[Shown]) -> bool:
    return any(isinstance(one.drawing, Drawing) for one in shown)


def _more(found: Findings, shown: int) -> str:
    return f" The {shown} strongest of {len(found.adapters)} are shown." if shown < len(found.adapters) else ""
