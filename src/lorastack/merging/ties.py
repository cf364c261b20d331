"""Ties: tensors of a base that have several names. What changes under one of them alone gets a tensor of its own.

A model that ties its head no more ties nothing: then every second name is written, as a copy or as it becomes. An
embedding that two stacks share stays one, since transformers 4 has it so whatever the files say.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorastack.base.model import BaseModel
from lorastack.core.factor import Factor
from lorastack.errors import Problems
from lorastack.merging.changes import Change, is_saved
from lorastack.ways import LIVE, SELECT, ways

#: Models whose head is scaled where it is tied, and only there.
_SCALED_WHEN_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
#: What stacks call an embedding that they share.
_SHARED = "embed_tokens.weight"


def head_of(base: BaseModel) -> tuple[str, str]:
    """(head, embedding) where the two are one tensor; empty where they are not."""
    if base.naming == "gguf":
        tied = "output.weight" not in base.shapes and "token_embd.weight" in base.shapes
        return ("output.weight", "token_embd.weight") if tied else ("", "")
    for name, of in base.tied.items():
        if name.endswith("weight") and not name.endswith(_SHARED):
            return name, of
    return "", ""


def tell_apart(
    changes: dict[str, Change], base: BaseModel, head: str, embedding: str, problems: Problems
) -> dict[str, tuple[str, Change | None]]:
    """Second name -> first name, change: what gets a tensor of its own; empty where all stays tied.

    ``changes`` keeps what happens to first names; ``head`` and ``embedding`` are those of `head_of`. What cannot be
    told apart is added to ``problems``.
    """
    ties = {head: embedding, **base.tied} if head else base.tied
    if head:
        _note_alike(changes, base, head, embedding)
    apart = [name for name, root in ties.items() if _is_apart(name, root, head, changes)]
    if apart and head and base.config.get("model_type") in _SCALED_WHEN_TIED:
        problems.add(
            f"weight {embedding} is the head too, which this model scales while they are one{ways(LIVE, SELECT)}"
        )
    elif apart and base.parts:
        problems.add(_along(apart[0], ties[apart[0]]))
    own = {name: changes.pop(name, None) for name in apart}
    for name, root in ties.items():
        if name not in apart:
            _join(name, root, changes, problems)
    return {name: (root, own[name] if name in own else changes.get(root)) for name, root in ties.items() if apart}


def _note_alike(changes: dict[str, Change], base: BaseModel, head: str, embedding: str) -> None:
    """Note what happens to head and embedding alike, by whichever name an adapter says it."""
    one, two = changes.get(embedding, Change()), changes.get(head, Change())
    if one.tokens and not two.tokens:  # trained tokens are those of a tied head too
        two.tokens = one.tokens
    if is_saved(base, embedding):  # a resized vocabulary is that of both, whichever was saved
        one.replaced, two.replaced = one.replaced or two.replaced, two.replaced or one.replaced
        changes.setdefault(embedding, one)
    if not two.empty:
        changes[head] = two


def _is_apart(name: str, root: str, head: str, changes: Mapping[str, Change]) -> bool:
    """Whether a second name needs a tensor of its own, and may have it."""
    one, two = changes.get(root, Change()), changes.get(name, Change())
    if _alike(one, two):
        return False
    return name == head or (one.empty and not name.endswith(_SHARED))


def _join(name: str, root: str, changes: dict[str, Change], problems: Problems) -> None:
    """Leave a tensor the change of its first name, where that of its second is the same."""
    one, two = changes.get(root, Change()), changes.pop(name, Change())
    if one.tokens and not two.tokens:  # trained tokens are those of every name
        two.tokens = one.tokens
    if not _alike(one, two):
        problems.add(_along(name, root) if one.empty else _along(root, name))


def _along(name: str, other: str) -> str:
    return f"weight {name} is one tensor with {other}, which would change along{ways(LIVE, SELECT)}"


def _alike(one: Change, other: Change) -> bool:
    """Whether two changes of one tensor are the same; sums are not compared."""
    if one.adds or other.adds or one.tokens != other.tokens:
        return False
    if one.replaced is None or other.replaced is None:
        return one.replaced is other.replaced
    return _same(one.replaced, other.replaced)


def _same(one: Factor, other: Factor) -> bool:
    return one is other or (one.shape == other.shape and one.raw().tobytes() == other.raw().tobytes())
