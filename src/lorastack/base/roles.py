"""Roles: what a weight of a base is, by its name and shape: a linear layer, an embedding, experts, or none of these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from lorastack.base.experts import fused
from lorastack.base.model import BaseModel, Use

#: ``other``: a norm, a bias, a router beside fused experts, what has a name of its own.
Role = Literal["linear", "head", "embedding", "experts", "conv", "other"]

#: The last part of a module's name. T5's bias by distance is an embedding too, what projects embeddings is not.
_EMBEDDING = re.compile(r"(?!\w*(proj|mapping))\w*embe?d\w*|wte|wpe|shared|relative_attention_bias|token_types")
#: BART's kind of them is called with other things than ids, so that no update of an embedding goes into it.
_POSITIONS = "embed_positions"
_HEADS = frozenset("lm_head embed_out proj_out output_projection output".split())
_ROUTERS = ("gate", "router")
#: What a class says -> the role.
_SAID: Mapping[str, Role] = {"linear": "linear", "embedding": "embedding", "conv": "conv", "other": "other"}


def role_of(base: BaseModel, name: str) -> Role:
    """What the weight is; ``other`` where its shape is not known.

    >>> base = BaseModel("b", "hf", None, {}, {"h.0.q.weight": (4, 3), "wte.weight": (9, 3), "ln.weight": (3,)})
    >>> [role_of(base, name) for name in base.shapes]
    ['linear', 'embedding', 'other']
    """
    said, guess = base.roles.get(name), _guessed(base, name)
    if said == "unknown":
        return "other"
    if said == "":  # of a module of the class's own, whose weight may be called or shaped like another kind's
        return "other" if guess in ("embedding", "conv") else guess
    if said is None or (said == "linear" and guess == "head"):
        return guess
    return _SAID[said]


def is_unknown(base: BaseModel, name: str) -> bool:
    """Whether the class of the base is known, and has no such weight: it makes its own of what files hold."""
    return base.roles.get(name) == "unknown"


def _guessed(base: BaseModel, name: str) -> Role:
    """The same, by name and shape alone."""
    shape = base.shape_of(name) or ()
    module, _, parameter = name.rpartition(".")
    if len(shape) == 3 and (fused(name) or (base.naming == "gguf" and "_exps" in module) or ".experts." in name):
        return "experts"
    if parameter != "weight" or 0 in shape:
        return "other"
    path, _, last = module.rpartition(".")
    if last == _POSITIONS:
        return "other"
    if len(shape) == 2 and (name in base.tied or name in base.tied.values()) and not _EMBEDDING.fullmatch(last):
        return "head" if name in base.tied or last in _HEADS else "embedding"
    if len(shape) == 2 and last in _HEADS and (last not in ("output", "proj_out") or not path):
        return "head"
    if len(shape) == 2 and _EMBEDDING.fullmatch(last):
        return "embedding"
    if len(shape) == 2 and last in _ROUTERS and f"{path}.experts.down_proj" in base.shapes:
        return "other"  # a module of its own kind in transformers, which PEFT's adapters do not reach
    if len(shape) == 2:
        return "linear"
    # With one channel for each group there is nothing that a low rank would save.
    return "conv" if len(shape) in (3, 4, 5) and shape[1] > 1 else "other"


def use_of(base: BaseModel, name: str) -> Use | None:
    """How the model computes with the weight; None where nothing is known but that it is kept so.

    >>> base = BaseModel("b", "hf", "GPT2Model", {}, {"h.0.c_fc.weight": (3, 12), "wte.weight": (9, 3), "b": (4, 4)})
    >>> [use_of(base, name) for name in base.shapes]
    [Use(kind='linear', turned=True), Use(kind='embedding', turned=True), None]
    """
    if base.use is not None:
        return base.use(name)
    role = role_of(base, name)
    if role == "experts":
        return Use("experts", base.kept_turned(name, "experts"))
    if role in ("linear", "head"):
        return Use("linear", base.kept_turned(name, "linear"))
    return Use("embedding", True) if role == "embedding" else None
