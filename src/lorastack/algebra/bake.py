"""Bake: a whole stack as one ordinary adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorastack.algebra.combine import available, cat, largest, weighted_sum
from lorastack.algebra.cut import Cut, Loss, overall
from lorastack.algebra.entries import Entry, check_fit, entries_of, weights_of
from lorastack.algebra.entrywise import ByEntry
from lorastack.algebra.method import Method
from lorastack.base import BaseModel, open_base
from lorastack.base.together import base_key
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta, read_all
from lorastack.core.dtypes import nonfinite_count
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.core.lazy import LazyDeltas
from lorastack.core.packed import Term
from lorastack.core.target import Naming
from lorastack.errors import ArgumentError, Failures, NonFiniteError, Problems, UnsupportedError
from lorastack.formats.kohya import FORMAT_KEY
from lorastack.formats.said_base import BASE, said_by
from lorastack.hub import hub_id
from lorastack.ways import argument, drop_extras, ways

if TYPE_CHECKING:
    from lorastack.core.stack import LoraStack

#: Called with the weights done and the weights there are.
Progress = Callable[[int, int], None]


def bake(
    stack: LoraStack,
    base: BaseModel | str | Path | None = None,
    name: str | None = None,
    *,
    method: str = "cat",
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_mixed_bases: bool = False,
    progress: Progress | None = None,
) -> LoadedLora:
    """See `LoraStack.bake`."""
    cut = Cut.of(rank, energy, tolerance)
    how = Method.of("svd" if method == "cat" and cut else method, density, seed)
    if how.name == "svd" and cut is None:
        raise ArgumentError(
            f"method svd needs {argument('rank')}, {argument('energy')} or {argument('tolerance')}; "
            "linear keeps what float32 can tell"
        )
    base = base if isinstance(base, BaseModel) or base is None else open_base(base)
    entries = entries_of(stack, base, "bake", allow_mixed_bases)
    _refuse_extras(entries)
    if base is not None:
        check_fit(entries, base)
    weights = _terms(entries)
    if how.name == "cat":
        deltas, said = _side_by_side(weights, entries), dict[str, Any]()
    else:
        deltas, said = _combined(weights, how, cut, progress)
    naming = entries[0].lora.naming
    return LoadedLora(
        name=name or "+".join(entry.name for entry in entries),
        adapters=MappingProxyType(deltas),
        metadata=MappingProxyType(_metadata([entry.lora for entry in entries], base, naming)),
        naming=naming,
        origin=tuple((entry.lora, entry.scale) for entry in entries),
        made=MappingProxyType(said),
    )


def with_coefficient(baked: LoadedLora, coefficient: float) -> LoadedLora:
    """A baked adapter with everything times the merge coefficient λ; its recipe says so."""
    return replace(
        baked,
        adapters=LazyDeltas(dict.fromkeys(baked.adapters), lambda name, _: baked.adapters[name].scaled(coefficient)),
        made=MappingProxyType({**baked.made, "coefficient": coefficient}),
    )


def _terms(entries: list[Entry]) -> dict[str, list[tuple[int, Term]]]:
    """Weight name -> its terms with the number of the entry each is from."""
    return {
        weight: [(n, (entries[n].scale, delta)) for n, delta in at.items()]
        for weight, at in weights_of(entries, "baked").items()
    }


def _side_by_side(weights: dict[str, list[tuple[int, Term]]], entries: list[Entry]) -> dict[str, LoraDelta]:
    # One scaling for all weights: programs that know one alpha and one rank for the whole file (vLLM,
    # llama.cpp) must compute the same.
    common = largest(term for numbered in weights.values() for _, term in numbered) or 1.0
    return {
        weight: cat([term for _, term in numbered], [entries[n].name for n, _ in numbered], common)
        for weight, numbered in weights.items()
    }


def _combined(
    weights: dict[str, list[tuple[int, Term]]], method: Method, cut: Cut | None, progress: Progress | None
) -> tuple[dict[str, LoraDelta], dict[str, Any]]:
    """Every weight by the method, and what the recipe says of it."""
    plain = {weight: [term for _, term in numbered] for weight, numbered in weights.items()}
    most = max(available(terms, method.space == "dense") for terms in plain.values())
    cut = cut and cut.at_most(most)
    trims = method.rule in ("ties", "magnitude_prune")
    step = _steps(progress, len(weights) * (3 if trims else 1))
    failures = Failures("the stack cannot be baked")
    for terms in plain.values():  # every NaN is named before the work begins
        failures.get(partial(_read, terms))
    failures.raise_any()
    by_entry = ByEntry(weights, method, lambda: next(step, None)) if method.space else None
    deltas: dict[str, LoraDelta] = {}
    losses: dict[str, Loss] = {}
    for weight, terms in plain.items():
        if by_entry:
            deltas[weight], losses[weight] = by_entry.combined(weight, cut)
        else:
            deltas[weight], losses[weight] = weighted_sum(terms, cut)
            next(step, None)
    return deltas, _said(method, cut, losses)


def _read(terms: Sequence[Term]) -> None:
    """NaN and Inf have no singular values, also where they were let in."""
    active = [delta for scale, delta in terms if scale != 0]
    read_all(active)
    found = [f.label for delta in active for f in delta.factors if f.allow_nonfinite and nonfinite_count(f.array)]
    if found:
        raise NonFiniteError("NaN or Inf can only be baked by cat, which keeps them; take the adapter out", found)


def _said(method: Method, cut: Cut | None, losses: Mapping[str, Loss]) -> dict[str, Any]:
    said: dict[str, Any] = {"method": method.name}
    if method.density is not None:
        said["density"] = method.density
    if method.rule in ("dare", "dare_ties"):
        said["seed"] = method.seed
    if cut and cut.ranks:
        said["rank"] = list(cut.ranks) if len(cut.ranks) > 1 else cut.ranks[0]
    if cut and cut.tolerance is not None:
        said["tolerance"] = cut.tolerance
    said["error"] = overall(losses)
    said["errors"] = {weight: loss.error for weight, loss in losses.items()}
    said["ranks"] = {weight: loss.rank for weight, loss in losses.items()}
    return said


def _steps(progress: Progress | None, total: int) -> Iterator[None]:
    for done in range(1, total + 1):
        if progress:
            progress(done, total)
        yield


def _refuse_extras(entries: list[Entry]) -> None:
    problems = Problems("a bake holds low-rank updates only")
    for name, lora, _ in entries:
        for kind, values in lora.extras.items():
            if kind not in HARMLESS:
                count = f"{len(values)} of them, such as {next(iter(values))}"
                problems.add(f"{name}: {kind}, {KINDS[kind]} ({count}){ways(drop_extras(kind))}")
    problems.raise_any(UnsupportedError)


def _metadata(loras: list[LoadedLora], base: BaseModel | None, naming: Naming) -> Mapping[str, Any]:
    """What every adapter of the stack agrees on, and what the base says."""
    keys = ("general.architecture", BASE, "task_type", "fan_in_fan_out", FORMAT_KEY)
    agreed = {}
    for key in keys:
        values = [lora.metadata[key] for lora in loras if lora.metadata.get(key) is not None]
        if values and all(value == values[0] for value in values):
            agreed[key] = values[0]
    words = [word for lora in loras if (word := said_by(lora))]
    named = {name for word in words if (name := hub_id(word))}
    if len(named) == 1 and len({base_key(word) for word in words}) == 1:
        agreed[BASE] = named.pop()
    elif base is not None and base.naming == "hf":
        agreed[BASE] = base.name
    if base is not None and naming == "gguf":
        agreed.setdefault(
            "general.architecture", base.architecture_name if base.naming == "gguf" else base.architecture.gguf
        )
    return agreed
