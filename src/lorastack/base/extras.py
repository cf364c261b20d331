"""An adapter's extras under the names of a base; what lies at several of its weights is cut as the update is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lorastack.base.foreign import Place, rows_at
from lorastack.base.model import BaseModel
from lorastack.core.adapter import Extras, LoadedLora
from lorastack.core.factor import Factor
from lorastack.errors import NamingError, Problems
from lorastack.ways import drop_extras, ways

#: Kinds whose values are rows of a weight's output.
_BY_ROW = ("dora", "lora_bias", "diff", "diff_b", "bias")


def extras_at_places(lora: LoadedLora, base: BaseModel) -> Extras:
    """Kind -> the base's name -> value; a name that the base lacks is kept.

    Raises
    ------
    NamingError
        Listing what lies at several weights of the base and cannot be cut.
    """
    problems = Problems(f"{lora.name} cannot be brought under the names of base {base.name}")
    found = {
        kind: values if kind == "alora" else MappingProxyType(_settled(kind, values, base, problems))
        for kind, values in lora.extras.items()
    }
    problems.raise_any(NamingError)
    return MappingProxyType(found)


def _settled(kind: str, values: Mapping[str, Any], base: BaseModel, problems: Problems) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        own = base.own_name(name) or (_beside_weight(name, base) if kind == "modules_to_save" else None)
        places = (Place(own),) if own else base.foreign.find(name) or (Place(name),)
        if not all(place.whole for place in places) and kind not in _BY_ROW:
            said = ", ".join(place.weight for place in places)
            problems.add(f"{kind} {name} is at several weights of the base, {said}{ways(drop_extras(kind))}")
            continue
        for place in places:
            found[place.weight] = _at(kind, value, place, base) if kind in _BY_ROW else value
    return found


def _beside_weight(name: str, base: BaseModel) -> str | None:
    """The base's name of a buffer, which a saved module has beside its weight and a live base does not list."""
    module, _, part = name.rpartition(".")
    own = base.own_name(f"{module}.weight")
    return f"{own.rpartition('.')[0]}.{part}" if own else None


def _at(kind: str, value: Factor, place: Place, base: BaseModel) -> Factor:
    """The rows of a value at a place; a magnitude in the shape that the weight's layer has it."""
    shape = base.shape_of(place.weight)
    if kind == "diff":
        part = rows_at(value, place)
        flat = shape and part.shape != shape and math.prod(part.shape) == math.prod(shape)
        return part.mapped(lambda x: x.reshape(shape), shape) if shape and flat else part
    if place.whole and (kind != "dora" or not shape or (len(shape) > 2) == (len(value.shape) > 1)):
        return value
    count = math.prod(value.shape)
    part = rows_at(value.mapped(lambda x: x.reshape(count), (count,)), place)
    if kind == "dora" and shape and len(shape) > 2:
        wanted = (1, part.shape[0], *(1 for _ in shape[2:]))
        return part.mapped(lambda x: x.reshape(wanted), wanted)
    return part
