"""Changes: what the adapters of a stack do to each weight of a base, in the order pushed, under the base's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from lorastack.algebra.entries import Entry
from lorastack.base.model import IN_GROUPS, BaseModel, Stored
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import KINDS
from lorastack.core.factor import Factor
from lorastack.core.kronecker import Kronecker
from lorastack.errors import NamingError, Problems
from lorastack.ways import LIVE, ways

#: What whole tensors an adapter brings along.
_SAVED = ("modules_to_save", "base_weight")


class Term(NamedTuple):
    """One adapter's update of a weight: its name, the stack's scale, the update, and a DoRA magnitude ``[out]``."""

    name: str
    scale: float
    delta: LoraDelta
    magnitude: Factor | None = None


class Tokens(NamedTuple):
    """Trained rows ``[len(ids), width]`` in place of an embedding's."""

    ids: tuple[int, ...]
    rows: Factor


@dataclass
class Change:
    """All that happens to one weight: what it starts from, which rows are put in, what is added in order.

    ``added`` are biases with their multipliers, where the weight is itself a bias; ``dense`` are updates of full rank.
    """

    replaced: Factor | None = None
    tokens: Tokens | None = None
    terms: list[Term] = field(default_factory=list)
    added: list[tuple[float, Factor]] = field(default_factory=list)
    dense: list[tuple[float, Factor | Kronecker]] = field(default_factory=list)

    @property
    def adds(self) -> bool:
        """Whether anything is added."""
        return bool(self.terms or self.added or self.dense)

    @property
    def empty(self) -> bool:
        """Whether nothing happens."""
        return not self.adds and self.replaced is None and self.tokens is None


def changes_of(entries: Sequence[Entry], base: BaseModel) -> dict[str, Change]:
    """Weight -> what the adapters, which fit the base (see `fitted`), do to it; those at scale 0 do nothing.

    Raises
    ------
    NamingError
        Listing what two adapters replace, and biases that find none to be added to.
    """
    changes: dict[str, Change] = {}
    owners: dict[str, str] = {}
    problems = Problems("the stack cannot be merged")

    def at(name: str) -> Change:
        return changes.setdefault(name, Change())

    def owned(name: str, what: str, by: str) -> bool:
        other = owners.setdefault(f"{what} {name}", by)
        if other != by:
            problems.add(f"{other} and {by} both replace {what} {name}; merge only one of them")
        return other == by

    for name, lora, scale in entries:
        if scale == 0:
            continue
        extras = lora.extras
        if "alora" in extras:
            problems.add(f"{name}: it has {KINDS['alora']}, which weights cannot do{ways(LIVE)}")
        for weight, delta in lora.adapters.items():
            if base.in_groups(weight, delta):
                problems.add(f"{name}: weight {weight} {IN_GROUPS}{ways(LIVE)}")
            at(weight).terms.append(Term(name, scale, delta, extras.get("dora", {}).get(weight)))
        for weight, factor in extras.get("lora_bias", {}).items():
            bias = f"{weight.removesuffix('.weight')}.bias"
            if base.place_of(bias) is None:
                problems.add(f"{name}: {weight} has a bias of lora_B, the base no bias to add it to{ways(LIVE)}")
            else:
                at(bias).added.append((scale * lora.adapters[weight].scaling, factor))
        for weight, factor in extras.get("diff_b", {}).items():
            if base.place_of(weight) is None:
                problems.add(f"{name}: the base has no bias {weight} to add a difference to{ways(LIVE)}")
            else:
                at(weight).added.append((scale, factor))
        for kind in ("lokr", "diff"):
            for weight, value in extras.get(kind, {}).items():
                at(weight).dense.append((scale, value))
                if weight in extras.get("dora", {}) or base.kept_turned(weight, "linear"):
                    problems.add(f"{name}: {weight} has a full update, which cannot be merged with DoRA or Conv1D")
        for kind in ("bias", *_SAVED):
            for weight, factor in extras.get(kind, {}).items():
                changes_it = kind != "base_weight" or factor.shape != base.shape_of(weight) or is_saved(base, weight)
                if changes_it and owned(weight, "weight", name):
                    at(weight).replaced = factor
        for weight, (ids, rows) in extras.get("new_tokens", {}).items():
            if owned(weight, "tokens of", name):
                at(weight).tokens = Tokens(tuple(ids), rows)
    problems.raise_any(NamingError)
    return changes


def resized(base: BaseModel, entries: Iterable[Entry]) -> tuple[BaseModel, int | None]:
    """The base with the vocabulary that adapters bring along, and its number of tokens; None where it stays.

    Who trains with a resized vocabulary saves embedding and head whole: what is trained on them fits the resized base.
    """
    said = base.config.get("vocab_size") or _of_text(base).get("vocab_size")
    shapes, stored = dict(base.shapes), dict(base.stored)
    counts: dict[int, str] = {}
    for name, lora, scale in entries:
        for kind in _SAVED:
            for weight, factor in lora.extras.get(kind, {}).items():
                own = base.shape_of(weight)
                if (
                    not own
                    or not scale
                    or factor.shape == own
                    or own[0] != said
                    or factor.shape[1:] != own[1:]
                    or len(factor.shape) != len(own)
                ):
                    continue
                counts.setdefault(factor.shape[0], f"{name} has {factor.shape[0]} tokens")
                for same in (weight, *_second_names(base, weight)):
                    place = base.place_of(same)
                    shapes[same] = factor.shape
                    stored[same] = Saved(
                        place.files if place else (), partial(_numbers, factor), place.parts if place else ()
                    )
    if not counts:
        return base, None
    problems = Problems(f"the stack does not fit base {base.name}")
    if len(counts) > 1:
        problems.add(f"the adapters were made with vocabularies of several sizes: {', '.join(counts.values())}")
    count = next(iter(counts))
    left = [name for name in shapes if _is_vocabulary(name) and shapes[name][:1] == (said,)]
    for name in left:
        problems.add(
            f"weight {name} has {said} tokens, the adapter was made with {count} and brings no such weight along; "
            "save it with save_embedding_layers"
        )
    problems.raise_any(NamingError)
    return replace(base, shapes=shapes, stored=stored), count


class Saved(Stored):
    """A weight of a base that an adapter brings along in another size."""


def _numbers(factor: Factor) -> np.ndarray:
    return factor.take()


def is_saved(base: BaseModel, weight: str) -> bool:
    """Whether a base that `resized` gave has this weight in another size."""
    return isinstance(base.stored.get(weight), Saved)


def _second_names(base: BaseModel, weight: str) -> list[str]:
    root = base.tied.get(weight, weight)
    return [name for name in (root, *(n for n, of in base.tied.items() if of == root)) if name != weight]


def _of_text(base: BaseModel) -> Mapping[str, object]:
    text = base.config.get("text_config")
    return text if isinstance(text, dict) else {}


def _is_vocabulary(name: str) -> bool:
    return name.endswith(tuple(f"{n}.weight" for n in ("embed_tokens", "wte", "lm_head", "embed_in", "embed_out")))
