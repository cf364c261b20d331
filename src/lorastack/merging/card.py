"""The card of a merged model: README.md as the hub reads it, with the mixture and what was lost to rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorastack.files import MERGE_RECIPE
from lorastack.formats.provenance import Provenance
from lorastack.markdown import in_a_cell
from lorastack.merging.survival import Survival

CARD, RECIPE = "README.md", MERGE_RECIPE


def card(provenance: Provenance, survivals: Sequence[Survival], base: str) -> str:
    """The text of README.md."""
    lines = ["---", f"base_model: {_quoted(base)}", "tags:", "- merge", "- lorastack", "---", ""]
    lines += [f"# A merge into {in_a_cell(base)}", ""]
    lines += ["Made with LoraStack: the adapters' updates were added to the base's weights, which need none now.", ""]
    lines += ["| adapter | scale |", "|---|---|"]
    lines += [f"| {in_a_cell(one.source)} | {one.scale:g} |" for one in provenance.ingredients]
    lines += ["", *_how(provenance.made)]
    if survivals:
        lines += ["", "Of each weight's update, once rounded to the type it is stored in:", ""]
        lines += ["| type | weights | error | kept |", "|---|---|---|---|"]
        lines += [f"| {kind} | {count} | {error:.2g} | {kept:.1%} |" for kind, count, error, kept in by_kind(survivals)]
    lines += ["", f"`lorastack merge {in_a_cell(base)} {RECIPE} -o OUT` makes it again.", ""]
    return "\n".join(lines)


def by_kind(survivals: Sequence[Survival]) -> list[tuple[str, int, float, float]]:
    """(type, weights, error, kept) of the tensors of each type, the error over all of them."""
    found = []
    for kind in dict.fromkeys(one.kind for one in survivals):
        same = [one for one in survivals if one.kind == kind]
        error = math.sqrt(sum(one.error**2 for one in same) / len(same))
        found.append((kind, len(same), error, sum(one.kept for one in same) / len(same)))
    return found


def _how(made: Mapping[str, Any]) -> list[str]:
    said = {key: value for key, value in made.items() if not isinstance(value, (dict, list))}
    return [f"Settings: {', '.join(f'{key} {value}' for key, value in said.items())}."] if said else []


def _quoted(text: str) -> str:
    return '"' + in_a_cell(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
