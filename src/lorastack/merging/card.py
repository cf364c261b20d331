"""The card of a merged model: README.md as the hub reads it, with the mixture and what was lost to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorastack.files import MERGE_RECIPE
from lorastack.formats.card import front_matter, ingredients, lost, settings
from lorastack.formats.provenance import Provenance
from lorastack.hub import hub_id, told
from lorastack.markdown import in_a_cell, table
from lorastack.merging.survival import Survival

RECIPE = MERGE_RECIPE


def card(provenance: Provenance, survivals: Sequence[Survival], base: str) -> str:
    """The text of README.md; of the base and the adapters what others may be told, no path of this machine."""
    named = in_a_cell(told(base))
    lines = [
        *front_matter(None, hub_id(base), ("merge", "lorastack")),
        f"# A merge into {named}",
        "",
        "Made with LoraStack: the adapters' updates were added to the base's weights, which need none now.",
        "",
        *ingredients(provenance.ingredients),
        *settings(provenance.made),
        *lost(provenance.made),
    ]
    if survivals:
        lines += ["", "Of each weight's update, once rounded to the type it is stored in:", ""]
        lines += table(
            ("type", "weights", "error", "kept"),
            [(kind, f"{count}", f"{error:.2g}", f"{kept:.1%}") for kind, count, error, kept in by_kind(survivals)],
        )
    lines += ["", f"`lorastack merge BASE {RECIPE} -o OUT` makes it again; BASE is {named}.", ""]
    return "\n".join(lines)


def by_kind(survivals: Sequence[Survival]) -> list[tuple[str, int, float, float]]:
    """(type, weights, error, kept) of the tensors of each type, the error over all of them."""
    found = []
    for kind in dict.fromkeys(one.kind for one in survivals):
        same = [one for one in survivals if one.kind == kind]
        error = math.sqrt(sum(one.error**2 for one in same) / len(same))
        found.append((kind, len(same), error, sum(one.kept for one in same) / len(same)))
    return found
