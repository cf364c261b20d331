"""What an adapter may hold beside low-rank updates, by kind, and which of it weighs on one weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: kind -> what it does, for messages. The keys inside a kind are the base's own names.
KINDS = {
    "dora": "a DoRA magnitude (rescales the rows of the changed weight)",
    "lora_bias": "a bias of lora_B (adds scaling * bias to the output)",
    "bias": "a trained bias of the base layer",
    "modules_to_save": "a whole module saved in place of the base's",
    "new_tokens": "trained embedding rows of some tokens",
    "norm": "a norm weight",
    "base_weight": "the base's own embedding, saved along",
    "lokr": "a Kronecker product of two full factors (LoKr), which no low rank holds",
    "diff": "a full difference of a weight",
    "diff_b": "a difference of a bias",
    "alora": "invocation tokens (an activated LoRA acts only after them)",
}
#: Kinds that change nothing: PEFT saves embeddings along whenever they are targeted.
HARMLESS = frozenset({"base_weight"})
#: Kinds that nothing but reading honours.
NEVER = frozenset({"norm"})
#: Kinds that no live model can be given; the others of them a merge adds to the weight.
NEVER_LIVE = NEVER | {"lokr", "diff", "diff_b"}


#: Token ids are 32-bit numbers in every format and program.
_MAX_TOKEN = (1 << 31) - 1


def are_tokens(value: object) -> bool:
    """Whether a value out of a file is a list of token ids."""
    return isinstance(value, (list, tuple)) and all(type(one) is int and 0 <= one <= _MAX_TOKEN for one in value)


def extras_at(extras: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The kinds of extras that change what the weight ``name`` computes, beyond its low-rank update."""
    if not extras:
        return []
    module = name.removesuffix(".weight")
    found = []
    for kind, values in extras.items():
        if kind in HARMLESS:
            continue
        if (
            kind == "alora"
            or name in values
            or f"{module}.bias" in values
            or (kind == "modules_to_save" and any(key.startswith(module + ".") for key in values))
        ):
            found.append(kind)
    return found
