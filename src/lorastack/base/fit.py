"""Whether an adapter fits a base: every weight and every extra there, of the right shape and architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorastack.base.hint import elsewhere, in_short, of_other_parts
from lorastack.base.model import BaseModel
from lorastack.base.names import convert_names, tied_in_gguf
from lorastack.base.parts import part_of
from lorastack.base.rows import Rows
from lorastack.base.settle import settle
from lorastack.core.adapter import LoadedLora
from lorastack.core.extras import KINDS, NEVER
from lorastack.core.factor import Factor
from lorastack.errors import LoraStackError
from lorastack.ways import drop_extras, ways

#: An embedding saved along is the base's own where it is as near as rounding to 16 bits leaves it.
SAME_RTOL, SAME_ATOL = 1e-2, 1e-3
#: Numbers that are compared at once.
_BLOCK = 1 << 20


def misfits(lora: LoadedLora, base: BaseModel) -> list[str]:
    """Everything of ``lora`` that has no place in ``base``, a line each; empty when it fits.

    Names of the other kind, and of other saves, are converted first, where the base allows it. What attaching the
    adapter to the live model would refuse is refused here.
    """
    found = []
    said = lora.metadata.get("general.architecture")
    if said and lora.naming == base.naming == "gguf" and said != base.architecture_name:
        found.append(f"it is for architecture {said!r}, the base is {base.architecture_name!r}")
    try:
        lora = convert_names(lora, base, base.naming) if lora.naming not in (base.naming, "own") else settle(lora, base)
    except LoraStackError as error:
        return found + list(error.problems or [str(error)])
    strangers = [name for name in lora.adapters if base.shape_of(name) is None]
    others = of_other_parts(strangers, base)
    found += others.values()
    strangers = [name for name in strangers if part_of(name) not in others]
    if hint := elsewhere(strangers, lora, base):
        found.append(hint)
    lines = []
    for name, delta in lora.adapters.items():
        if base.shape_of(name) is None and part_of(name) in others:
            continue
        if base.shape_of(name) is None:
            lines.append(f"weight {name} is none of the base's {base.count} weights")
        elif problem := base.misfit(name, delta):
            lines.append(problem)
        elif base.naming == "gguf" and (problem := tied_in_gguf(name, base)):
            lines.append(f"weight {name}: {problem}")
    found += lines if hint else in_short(lines, lora, base)
    return found + [line for kind, values in lora.extras.items() for line in _extra(kind, values, lora, base)]


def same_numbers(saved: np.ndarray, own: np.ndarray) -> bool:
    """Whether an embedding that an adapter saved along is the base's own."""
    return saved.shape == own.shape and bool(
        np.allclose(own.astype(np.float32), saved.astype(np.float32), rtol=SAME_RTOL, atol=SAME_ATOL)
    )


def is_resized(saved: np.ndarray, own: np.ndarray) -> bool:
    """Whether an embedding that an adapter saved along is the base's own but for the last rows, those of new tokens.

    Who resizes a vocabulary fills the new rows at random; what an adapter was trained with are its own.
    """
    if saved.shape != own.shape or saved.ndim != 2:
        return False
    near = np.isclose(own.astype(np.float32), saved.astype(np.float32), rtol=SAME_RTOL, atol=SAME_ATOL)
    same = np.asarray(near.all(axis=1))
    first = int(np.argmin(same))
    return first > 0 and not same[first:].any()


def _same_as_stored(saved: Factor, base: BaseModel, name: str) -> bool:
    """The same of a base in files, a block of rows at a time: an embedding may have gigabytes."""
    place = base.place_of(name)
    if place is None or len(place.parts) != 1 or saved.shape != base.shape_of(name):
        return same_numbers(saved.raw(), base.weight(name))
    rows = Rows(place.parts[0])
    if rows.count * rows.columns != math.prod(saved.shape):  # in another size than the files have it
        return same_numbers(saved.raw(), base.weight(name))
    array = saved.raw().reshape(rows.count, rows.columns)
    step = max(1, _BLOCK // max(rows.columns, 1))
    return all(
        same_numbers(array[first : first + step], rows.read(first, min(first + step, rows.count)))
        for first in range(0, rows.count, step)
    )


def _extra(kind: str, values: Mapping[str, Any], lora: LoadedLora, base: BaseModel) -> Iterator[str]:
    """What of one kind of extras does not fit."""
    if kind in NEVER:
        yield f"{kind}: {KINDS[kind]}, which cannot be honoured"
        return
    if kind == "alora":
        return
    for name, value in values.items():
        if kind in ("dora", "lora_bias"):
            yield from _beside(kind, name, value, lora, base)
        elif kind == "new_tokens":
            ids, rows = value
            yield from _tokens(name, ids, rows, base)
        elif (shape := base.shape_of(name)) is None:
            yield f"{kind} {name} is none of the base's {base.count} weights"
        elif shape and value.shape != shape and not (kind in ("lokr", "diff") and _same_rows(value.shape, shape)):
            yield f"{kind} {name} is {list(value.shape)}, the base's {list(shape)}"
        elif (
            kind == "base_weight"
            and name in base.stored
            and not base.quantised
            and not _same_as_stored(value, base, name)
        ):
            yield changed_base(name, value.shape, shape)


def _same_rows(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether a file keeps a convolution's kernel flat."""
    return shape[:1] == own[:1] and math.prod(shape) == math.prod(own)


def changed_base(name: str, saved: tuple[int, ...], own: tuple[int, ...]) -> str:
    """The word for an embedding saved along that is not the base's own."""
    return (
        f"saved base weight {name} {list(saved)} differs from the model's {list(own)}: the adapter was trained on a "
        "changed base" + ways("load that into the model first", drop_extras("base_weight"))
    )


def _beside(kind: str, name: str, value: Factor, lora: LoadedLora, base: BaseModel) -> Iterator[str]:
    delta = lora.get(name)
    if delta is None:
        yield f"{kind} {name} goes with no update"
    elif delta.kind not in ("linear", "conv", *(["embedding"] if kind == "dora" else [])):
        yield f"{kind} {name}: it needs a linear layer or a convolution, this update is of {delta.kind}"
    elif math.prod(value.shape) != delta.out_features:
        yield f"{kind} {name} is {list(value.shape)}, the weight has {delta.out_features} rows"
    elif kind == "dora" and base.quantised and not base.shape_of(name):
        yield f"dora {name}: DoRA needs the weight's own numbers, which this base holds packed"


def _tokens(name: str, ids: tuple[int, ...], rows: Factor, base: BaseModel) -> Iterator[str]:
    shape = base.shape_of(name)
    if shape is None or (len(shape) == 2 and shape[1] != rows.shape[-1]):
        yield f"token rows of {name}: the base has no embedding of width {rows.shape[-1]} there"
    elif shape and ids and max(ids) >= shape[0]:
        yield f"token rows of {name}: token {max(ids)} is outside the vocabulary of {shape[0]}"
