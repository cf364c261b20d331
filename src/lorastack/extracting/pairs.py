"""Pairs: which weights of two models belong together, and which of them an adapter can hold a difference of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorastack.base.model import BaseModel
from lorastack.base.roles import Role, role_of
from lorastack.core.delta import Kind
from lorastack.errors import NamingError, Problems, UnsupportedError, shown

#: How many weights of a wrong base are named.
_NAMED = 10
_KINDS: Mapping[Role, Kind] = {"linear": "linear", "experts": "experts", "conv": "conv"}
#: What --embeddings adds.
_MORE: Mapping[Role, Kind] = {"embedding": "embedding", "head": "linear"}


@dataclass(frozen=True)
class Pairs:
    """The weights of two models, by the base's names.

    Attributes
    ----------
    low_rank
        Weight -> its kind as an update, of those that both have in one shape.
    others
        Those that both have in one shape, and that are no linear layers: norms, biases, embeddings.
    reshaped
        Weight -> (shape in the base, shape in the fine-tuned model).
    added, missing
        Weights that only the fine-tuned model has, or only the base.
    """

    low_rank: Mapping[str, Kind]
    others: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    added: tuple[str, ...]
    missing: tuple[str, ...]


def pairs_of(finetuned: BaseModel, base: BaseModel, embeddings: bool) -> Pairs:
    """The pairs; ``embeddings`` counts embeddings and heads among what is low-rank.

    Raises
    ------
    UnsupportedError
        When a model is quantised in a way of its own.
    NamingError
        Listing why the two are no fine-tune and its base: names of two kinds, another architecture, other shapes.
    """
    _refuse_strangers(finetuned, base)
    kinds = {**_KINDS, **(_MORE if embeddings else {})}
    low_rank: dict[str, Kind] = {}
    others: list[str] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    differ: list[str] = []
    for name, shape in base.shapes.items():
        role = role_of(base, name)
        # A second name of one weight, which is compared under its first. A low-rank update has to be there for each
        # name, as live models keep an update apart from the weight.
        second = name in base.tied and name in finetuned.tied and not (embeddings and role in _MORE)
        if name not in finetuned.shapes or second:
            continue
        own = finetuned.shapes[name]
        if own != shape:
            reshaped[name] = (shape, own)
            if role in _KINDS:
                differ.append(f"weight {name} is {list(shape)} in the base, {list(own)} in {finetuned.name}")
        elif role in kinds:
            low_rank[name] = kinds[role]
        else:
            others.append(name)
    _refuse_other_shapes(differ, low_rank, finetuned, base)
    added = tuple(name for name in finetuned.shapes if name not in base.shapes)
    missing = tuple(name for name in base.shapes if name not in finetuned.shapes)
    return Pairs(low_rank, tuple(others), reshaped, added, missing)


def _refuse_strangers(finetuned: BaseModel, base: BaseModel) -> None:
    packed = Problems("these models cannot be compared")
    for model in (finetuned, base):
        if model.quantised:
            said = model.config.get("quantization_config")
            method = said.get("quant_method") if isinstance(said, dict) else None
            how = shown(method) if isinstance(method, str) else "a way of its own"
            packed.add(f"{model.name} is quantised ({how}); give the model it was made from")
    if finetuned.naming != base.naming:
        kinds = {"hf": "a Hugging Face folder", "gguf": "a GGUF file", "own": "neither folder nor GGUF"}
        packed.add(
            f"{finetuned.name} is {kinds[finetuned.naming]} and {base.name} is {kinds[base.naming]}; give two of a kind"
        )
    elif (own := _family(finetuned)) != (wanted := _family(base)):
        packed.add(
            f"{finetuned.name} is of another architecture ({own}) than {base.name} ({wanted}); give the model it was "
            "trained from"
        )
    elif not set(finetuned.shapes) & set(base.shapes):
        packed.add(f"{finetuned.name} and {base.name} have no weight in common; give the model it was trained from")
    packed.raise_any(UnsupportedError)


def _family(model: BaseModel) -> str:
    """What it is a model of, whatever head it has: a classifier may be trained from a model that writes text."""
    kind = model.config.get("model_type") if model.naming == "hf" else None
    return shown(kind or model.architecture_name or "not said")


def _refuse_other_shapes(lines: list[str], fits: Mapping[str, Kind], finetuned: BaseModel, base: BaseModel) -> None:
    """A layer or two of another shape are listed; where it is most of them, it is another base."""
    if len(lines) <= len(fits):
        return
    problems = Problems(
        f"{finetuned.name} was not trained from {base.name}: {len(lines)} of {len(lines) + len(fits)} linear layers "
        "have other shapes"
    )
    for line in lines[:_NAMED]:
        problems.add(line)
    if len(lines) > _NAMED:
        problems.add(f"and {len(lines) - _NAMED} more")
    problems.raise_any(NamingError)
