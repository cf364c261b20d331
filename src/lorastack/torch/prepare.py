"""Make an adapter ready for a model: find every place, convert names, read factors; change nothing yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorastack.base.hint import elsewhere, in_short, of_other_parts
from lorastack.base.names import convert_names, names_of_places
from lorastack.base.parts import part_of
from lorastack.base.settle import settle
from lorastack.core.adapter import Extras, LoadedLora, LoraAdapter
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import KINDS, NEVER_LIVE
from lorastack.errors import NonFiniteError, Problems, UnsupportedError
from lorastack.torch.dora import Dora
from lorastack.torch.places import Place, Places
from lorastack.torch.prepared import Prepared
from lorastack.torch.saved import Patch, make_patches
from lorastack.torch.tensors import to_torch
from lorastack.ways import CONVERT, drop_extras, ways


@dataclass
class Candidate:
    """An adapter on its way onto a model: its name there and its scale."""

    name: str
    adapter: LoadedLora | LoraAdapter
    scale: float

    @classmethod
    def of(cls, adapter: LoadedLora | LoraAdapter, scale: float, taken: Sequence[str]) -> Candidate:
        own = adapter.name if isinstance(adapter, LoadedLora) else f"adapter{len(taken)}"
        name, n = own, 2
        while name in taken:
            name, n = f"{own}#{n}", n + 1
        return cls(name, adapter, scale)


def prepare(
    candidate: Candidate, places: Places, dtype: torch.dtype | None, allow_partial: bool
) -> tuple[list[Prepared], list[Patch], list[str]]:
    """(updates, patches, what was left out under ``allow_partial``).

    Raises
    ------
    UnsupportedError
        Listing every weight without a place, every misfit, every extra that cannot be honoured.
    """
    problems = Problems("it does not fit the model")
    missing = Problems("")
    lost = missing if allow_partial else problems
    hint = ""
    others: Mapping[str, str] = {}
    if isinstance(candidate.adapter, LoadedLora):
        extras: Extras
        lora = candidate.adapter = _in_own_names(candidate.adapter, places)
        wanted = dict(lora.adapters)
        extras = lora.extras
        strangers = [name for name in wanted if places.get(name) is None]
        if strangers:
            others = of_other_parts(strangers, base := places.as_base())
            for line in others.values():
                lost.add(line)
            strangers = [name for name in strangers if part_of(name) not in others]
            if hint := elsewhere(strangers, lora, base):
                lost.add(hint)
    else:
        wanted = _by_target(candidate.adapter, places)
        extras = {}
        if not wanted:
            problems.add("none of its target modules and layers is in the model")
    for kind in sorted(NEVER_LIVE):
        if kind in extras:
            problems.add(f"{KINDS[kind]} cannot be honoured{ways(drop_extras(kind))}")
    parts: list[Prepared] = []
    strange: list[str] = []
    for name, delta in wanted.items():
        place = places.get(name)
        if place is None:
            if part_of(name) not in others:
                strange.append(f"weight {name} is none of the model's")
            continue
        if place.device.type == "meta":
            problems.add(f"weight {name} is on the meta device; load the model's weights first")
            continue
        if problem := place.misfit(delta):
            problems.add(f"weight {name}: {problem}")
            continue
        part = _prepared(place, delta, extras, dtype or place.dtype, problems)
        if part is not None:
            parts.append(part)
    if strange and not hint and not allow_partial and isinstance(candidate.adapter, LoadedLora):
        strange = in_short(strange, candidate.adapter, places.as_base())
    for line in strange:
        lost.add(line)
    patches = make_patches(extras, places, lost)
    problems.raise_any(UnsupportedError)
    return parts, patches, missing.lines


def _in_own_names(lora: LoadedLora, places: Places) -> LoadedLora:
    """The adapter under the model's own names; nothing is asked of the model while they are the same."""
    if lora.naming == "gguf":
        base = places.as_base()
        if not base.config:
            raise UnsupportedError(
                f"{type(places.model).__name__} has no config, so GGUF names cannot be converted for it{ways(CONVERT)}"
            )
        return convert_names(lora, base, "hf")
    known = not lora.extras and all(places.get(name) is not None for name in lora.adapters)
    if known and all(delta.kind != "stored" for delta in lora.adapters.values()):
        return lora
    base = places.as_base()
    return settle(lora, base)


def _by_target(adapter: LoraAdapter, places: Places) -> dict[str, LoraDelta]:
    """An adapter known by (target module, layer), under the model's weight names."""
    found: dict[str, LoraDelta] = {}
    for place, name in names_of_places(places.as_base(), adapter).items():
        delta = adapter.delta(*place)
        if delta is not None:
            found[name] = delta.scaled(adapter.alpha / adapter.rank)
    return found


def _prepared(
    place: Place, delta: LoraDelta, extras: Extras, dtype: torch.dtype, problems: Problems
) -> Prepared | None:
    """The factors as tensors and what goes with them; None, with the reasons in ``problems``, when they are not."""
    tensors = []
    for factor in delta.factors:
        try:
            tensors.append(to_torch(factor, dtype, place.device))
        except NonFiniteError as error:
            problems.add(str(error))
    if len(tensors) < 2:
        return None
    a, b = tensors
    dora = bias = None
    magnitude = extras.get("dora", {}).get(place.name)
    if magnitude is not None:
        if place.kind == "parameter" or not _has_plain_weight(place):
            problems.add(
                f"weight {place.name}: DoRA needs a plain linear layer, convolution or embedding, its weight at hand"
            )
        else:
            dora = Dora(place, delta, magnitude, dtype)
    lora_bias = extras.get("lora_bias", {}).get(place.name)
    if lora_bias is not None:
        if place.kind not in ("linear", "conv"):
            problems.add(f"weight {place.name}: a bias of lora_B needs a linear layer or convolution")
        else:
            bias = to_torch(lora_bias, dtype, place.device)
    let_in = any(factor.allow_nonfinite for factor in delta.factors)
    finite = not let_in or bool(a.isfinite().all() and b.isfinite().all())
    tokens = extras.get("alora", {}).get("invocation_tokens")
    if tokens and (place.kind != "linear" or dora is not None):
        problems.add(f"weight {place.name}: invocation tokens go with plain low-rank updates of linear layers only")
    return Prepared(place, a, b, delta.rank, delta.scaling, dora, bias, finite, tuple(tokens) if tokens else None)


def _has_plain_weight(place: Place) -> bool:
    weight = getattr(place.module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() >= 2
