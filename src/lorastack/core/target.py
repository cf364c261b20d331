"""TargetModule, and what a weight's name says: its kind of naming, its target module, its layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lorastack.errors import ArgumentError

#: ``kohya``: a module path with ``_`` for ``.`` behind ``lora_unet_`` and the like, told apart only against a base.
Naming = Literal["gguf", "hf", "kohya", "own"]


@dataclass(frozen=True, order=True)
class TargetModule:
    """A place in every layer of a transformer that adapters change.

    >>> str(TargetModule.QUERY_PROJ), str(TargetModule.custom(42))
    ('q_proj', 'custom_42')
    """

    name: str

    QUERY_PROJ: ClassVar[TargetModule]
    KEY_PROJ: ClassVar[TargetModule]
    VALUE_PROJ: ClassVar[TargetModule]
    OUTPUT_PROJ: ClassVar[TargetModule]
    GATE_PROJ: ClassVar[TargetModule]
    UP_PROJ: ClassVar[TargetModule]
    DOWN_PROJ: ClassVar[TargetModule]

    def __post_init__(self) -> None:
        if self.name not in GGUF_STEM and not re.fullmatch(r"custom_\d+", self.name):
            raise ArgumentError(f"{self.name!r} is not a target module; there are {', '.join(GGUF_STEM)} and custom_N")

    @classmethod
    def custom(cls, number: int) -> TargetModule:
        """A place of the user's own, told apart by ``number`` (0 or more)."""
        return cls(f"custom_{number}")

    @classmethod
    def of(cls, target: TargetModule | str) -> TargetModule:
        """``target`` itself, or the target module that a string names."""
        return target if isinstance(target, TargetModule) else cls(target)

    def __str__(self) -> str:
        return self.name


#: Target module -> the stem llama.cpp gives its tensor (`gguf` constants, LLM_TENSOR names).
GGUF_STEM = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_FROM_STEM = {stem: target for target, stem in GGUF_STEM.items()}

TargetModule.QUERY_PROJ = TargetModule("q_proj")
TargetModule.KEY_PROJ = TargetModule("k_proj")
TargetModule.VALUE_PROJ = TargetModule("v_proj")
TargetModule.OUTPUT_PROJ = TargetModule("o_proj")
TargetModule.GATE_PROJ = TargetModule("gate_proj")
TargetModule.UP_PROJ = TargetModule("up_proj")
TargetModule.DOWN_PROJ = TargetModule("down_proj")

_GGUF_NAME = re.compile(
    r"(?:(?:enc\.|dec\.)?blk\.(\d{1,9})\.([a-z0-9_]+)|token_embd|output|output_norm|cls(?:\.output)?)\.weight"
)
_HF_LISTS = frozenset("layers h blocks block layer".split())
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_HF_NAME = re.compile(r"[^.\s]+(?:\.[^.\s]+)+")


def place_of(name: str) -> tuple[TargetModule, int] | None:
    """(target module, layer) of a weight by its GGUF or Hugging Face name; None where it has none.

    >>> place_of("blk.3.attn_output.weight")
    (TargetModule(name='o_proj'), 3)
    >>> place_of("model.layers.3.mlp.up_proj.weight")
    (TargetModule(name='up_proj'), 3)
    >>> place_of("token_embd.weight")
    """
    if match := _GGUF_NAME.fullmatch(name):
        target = _FROM_STEM.get(match[2] or "")
        return (TargetModule(target), int(match[1])) if target else None
    *parts, target, ending = name.split(".") if name.count(".") > 2 else ("", "", "")
    if ending != "weight" or target not in GGUF_STEM:
        return None
    for at in range(len(parts) - 1, 0, -1):  # the innermost list of layers
        if parts[at - 1] in _HF_LISTS and _NUMBER.fullmatch(parts[at]):
            return TargetModule(target), int(parts[at])
    return None


def naming_of(names: list[str]) -> Naming:
    """Whose names these are: ``"gguf"``, ``"hf"`` (dotted ``state_dict`` keys), or the caller's ``"own"``."""
    if names and all(_GGUF_NAME.fullmatch(name) for name in names):
        return "gguf"
    if names and all(_HF_NAME.fullmatch(name) for name in names):
        return "hf"
    return "own"


def is_front(old: str, name: str) -> bool:
    """Whether a name begins with these whole parts."""
    return old == "" or name == old or name.startswith(old + ".")


def with_new_front(name: str, rename: Mapping[str, str]) -> str:
    """``name`` with the first matching front replaced; an empty one is put before, or taken away."""
    for old, new in rename.items():
        if is_front(old, name):
            return ".".join(part for part in (new, name[len(old) :].removeprefix(".")) if part)
    return name
