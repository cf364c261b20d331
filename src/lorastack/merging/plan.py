"""Plan: which stored tensors of a base change and by what; where the head is untied; which tensors are new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lorastack.algebra.entries import Entry, fitted
from lorastack.base.all_names import with_all_names
from lorastack.base.model import BaseModel, Part
from lorastack.base.rows import Rows
from lorastack.errors import Problems, UnsupportedError
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.merging.changes import Change, changes_of, resized
from lorastack.merging.heads import with_heads
from lorastack.merging.ties import head_of, tell_apart
from lorastack.merging.update import Update, shape_in_file
from lorastack.ways import LIVE, SELECT, ways

#: Quantised in a way of its own -> how people call it.
_METHODS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}
_FULL = "merge into the model it was made from, and quantise that"


class Added(NamedTuple):
    """A tensor that the base's files do not have, written behind ``like`` and in its type.

    A head that was one with the embedding ``like`` and is not now, or what an adapter saved whole.
    """

    name: str
    like: Part
    update: Update | None


@dataclass(frozen=True)
class Plan:
    """What a merge does to the base's files.

    ``updates`` goes by part: every stored tensor that changes. ``vocabulary`` is the new number of tokens, if any,
    ``fields`` what else its configuration says anew.
    """

    base: BaseModel
    updates: Mapping[Part, Update]
    added: tuple[Added, ...] = ()
    vocabulary: int | None = None
    untied: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


def plan(entries: Sequence[Entry], base: BaseModel) -> Plan:
    """Find every tensor that the stack changes.

    Raises
    ------
    UnsupportedError
        When the base is quantised in a way of its own, or a weight is not one that can be written.
    NamingError
        When an adapter does not fit the base: one line, then at most ten.
    """
    _refuse_quantised(base)
    _refuse_fp8(base)
    base = with_all_names(base)
    with_head, fields = with_heads(_with_a_head(base), entries)
    whole, vocabulary = resized(with_head, entries)
    changes = changes_of(fitted(entries, whole), whole)
    problems = Problems(f"base {base.name} cannot be merged into")
    parted = tell_apart(changes, whole, *head_of(base), problems)
    added: tuple[Added, ...] = ()
    for name, (root, change) in parted.items():
        if place := base.place_of(root):
            update = _updates(root, change, whole, problems)[0][1] if change else None
            added += (Added(name, place.parts[0], replace(update, weight=name) if update else None),)
    updates: dict[Part, Update] = {}
    for name, change in changes.items():
        if change.replaced is not None and base.shape_of(name) is None:
            added += (
                Added(name, _last(base), Update(name, shape_in_file(change.replaced.shape, None), **_said(change))),
            )
            continue
        updates |= dict(_updates(name, change, whole, problems))
    problems.raise_any(UnsupportedError)
    return Plan(base, updates, added, vocabulary, bool(parted), fields)


def _last(base: BaseModel) -> Part:
    """The tensor behind which new ones are written: the last matrix of the last file."""
    parts = [part for place in base.stored.values() for part in place.parts if len(Rows(part).shape) == 2]
    return max(parts, key=lambda part: (str(part.file.path), Rows(part).start))


def _refuse_quantised(base: BaseModel) -> None:
    if base.quantised:
        said = base.config.get("quantization_config")
        method = said.get("quant_method") if isinstance(said, dict) else None
        what = _METHODS.get(str(method), str(method or "a way of its own"))
        raise UnsupportedError(
            f"base {base.name} is quantised ({what}): its packed weights cannot take an update{ways(_FULL, LIVE)}"
        )


def _refuse_fp8(base: BaseModel) -> None:
    """A checkpoint of 8 bits, whose numbers may have scales beside them: one line, not one for each weight."""
    kept = [part.file for place in list(base.stored.values())[:1] for part in place.parts] if base.single_file else []
    for file in kept:
        assert isinstance(file, SafetensorsFile)
        packed = [key for key, (kind, *_) in file.tensors.items() if kind.startswith("F8_")]
        if packed:
            raise UnsupportedError(
                f"base {base.name} keeps {len(packed)} tensors such as {packed[0]} in fp8, which cannot be merged "
                f"into; merge into the 16-bit file it was made from{ways(LIVE, lead=', or ')}"
            )


def _with_a_head(base: BaseModel) -> BaseModel:
    """A GGUF base without a head of its own, which uses its embedding: with one it can be merged into."""
    if base.naming != "gguf" or "output.weight" in base.shapes or "token_embd.weight" not in base.shapes:
        return base
    shape, place = base.shapes["token_embd.weight"], base.stored["token_embd.weight"]
    return replace(base, shapes={**base.shapes, "output.weight": shape}, stored={**base.stored, "output.weight": place})


def _updates(name: str, change: Change, base: BaseModel, problems: Problems) -> list[tuple[Part, Update]]:
    """The stored tensors of one weight, each with its update."""
    place = base.place_of(name)
    shape = base.shape_of(name) or ()
    if place is None or not place.parts:
        problems.add(f"weight {name} is none of the files' own: transformers makes it of others{ways(LIVE, SELECT)}")
        return []
    said = _said(change)
    if len(place.parts) == 1:
        (part,) = place.parts
        if why := _unreadable(part):
            problems.add(f"weight {name} is {why}{ways(_FULL, LIVE)}")
        kind = change.terms[0].delta.kind if change.terms else "conv" if change.dense and len(shape) > 2 else None
        turned = bool(change.terms) and base.turned(name, change.terms[0].delta)
        return [(part, Update(name, shape_in_file(shape, kind), turned, **said))]
    if change.replaced is not None:
        problems.add(f"weight {name} is kept as {len(place.parts)} tensors, one for each expert; it cannot be replaced")
    experts, rows, columns = shape
    members = len(place.parts) // experts
    half = (1, rows // members, columns)
    return [
        (part, Update(name, half, False, **said, expert=n // members, first_out=n % members * half[1]))
        for n, part in enumerate(place.parts)
    ]


def _said(change: Change) -> dict[str, Any]:
    """What is done to a weight, as an `Update` has it."""
    return {
        "terms": tuple(change.terms),
        "replaced": change.replaced,
        "tokens": change.tokens,
        "added": tuple(change.added),
        "dense": tuple(change.dense),
    }


def _unreadable(part: Part) -> str | None:
    """Why a tensor cannot be merged into."""
    if isinstance(part.file, SafetensorsFile):
        stored = part.file.tensors[part.key][0]
        return None if stored in ("F32", "F16", "BF16", "F64") else f"stored as {stored}"
    return "in a file of the other byte order" if part.file.swapped else None
