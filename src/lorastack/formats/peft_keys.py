"""The keys of PEFT's weights: their grammar, and what other programs leave around and between their segments."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lorastack.errors import Problems

PREFIX = "base_model.model."
#: Ending of a key -> which part of a module's adapter it is.
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".token_adapter.trainable_tokens_delta": "new_tokens",
}
#: A tensor of PEFT's own that has no place in `PARTS`: a module of the base may well be called ``lora_head``.
FOREIGN = re.compile(
    r"(?:^|\.)(?:lora_(?:[A-Z]|embedding_[A-Z]|magnitude_vector|up|down|mid|variant\w*)(?=\.|$)|token_adapter\.)"
    r"|flat_param"
)
#: Segments by which programs wrap a module, never a model's own. All begin with an underscore: see `may_be_wrapped`.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Accelerate or Lightning",
    "_fpw_module": "FairScale",
    "_dmp_wrapped_module": "TorchRec",
    "_module": "Opacus",
}
_WRAPPED = re.compile(rf"(?:^|(?<=\.))({'|'.join(_WRAPPERS)})\.")
#: An adapter's name inside a key, where PEFT keeps the parts of several adapters.
_NAMED = re.compile(
    r"(.*\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta))"
    r"\.([^.]+?)(\.weight|\.bias)?"
)
_SAVED = ".modules_to_save."
#: A projection inside a module that PEFT wraps too, as in `nn.MultiheadAttention`.
_INSIDE = re.compile(r"\.base_layer\.(?!base_layer\.)(?=[^.]+\.lora_)")
_INSIDE_NAME = re.compile(r"\.base_layer\.(?!base_layer\.)[^.\n]+\.weight")


def split(name: str) -> tuple[str, str]:
    """(part, module path) of a key without its prefix; part is ``""`` for the base's own tensors."""
    for ending, part in PARTS.items():
        if name.endswith(ending):
            return part, name[: -len(ending)]
    return "", name.rpartition(".")[0]


def is_inside(key: str) -> bool:
    """Whether a key is of a projection inside a module that PEFT wraps too."""
    return _INSIDE.search(key) is not None


def may_be_wrapped(names: Collection[str]) -> bool:
    """Whether a wrapper's segment may be inside these names: a search through all of them, as opening is often."""
    text = "\n".join(names)
    return "._" in text or (".base_layer." in text and _INSIDE_NAME.search(text) is not None)


@dataclass(frozen=True)
class PlainKeys:
    """``stored`` maps each key as PEFT saves it to the file's own; ``notes`` say what was left out of the keys."""

    stored: dict[str, str]
    notes: tuple[str, ...]


def plain_keys(keys: Collection[str], where: object, problems: Problems) -> PlainKeys | None:
    """The keys without what other programs put into them; None when they have nothing of the kind."""
    now = {key: key for key in keys}
    notes = [note for step in (_without_wrappers, _without_name, _with_prefix) for note in step(now, problems)]
    for key, plain in now.items():
        if ".lora_" in plain:
            now[key] = _INSIDE.sub(".", plain)
    if all(key == plain for key, plain in now.items()):
        return None
    stored: dict[str, str] = {}
    for key, plain in now.items():
        if plain in stored:
            problems.add(f"{where}: tensors {stored[plain]} and {key} are for one place, {plain}; keep one of them")
        stored[plain] = key
    return PlainKeys(stored, tuple(notes))


def _without_wrappers(now: dict[str, str], _: Problems) -> list[str]:
    """Take the segments of wrappers out of the keys, changing ``now``: the file's key -> the key so far."""
    seen: dict[str, None] = {}
    for key, plain in now.items():
        for wrapper in _WRAPPED.findall(plain):
            seen[wrapper] = None
        now[key] = _WRAPPED.sub("", plain)
    # DataParallel's `module` is a name that a model may have too; not in front of everything.
    while now and all(plain.startswith("module.") for plain in now.values()):
        seen["module"] = None
        for key, plain in now.items():
            now[key] = plain.removeprefix("module.")
    makers = {**_WRAPPERS, "module": "DataParallel, DDP or DeepSpeed"}
    said = ", ".join(f"{wrapper} ({makers[wrapper]})" for wrapper in seen)
    return [f"keys were saved under {said}; read without it"] if seen else []


def _without_name(now: dict[str, str], problems: Problems) -> list[str]:
    """Take the adapter's name out of the keys, where it stands between a part and its ending."""
    names: dict[str, None] = {}
    shorter: dict[str, str] = {}
    for key, plain in now.items():
        match = _NAMED.fullmatch(plain)
        if match and (match[3] or match[2] not in ("weight", "bias")):
            names[match[2]] = None
            shorter[key] = match[1] + (match[3] or "")
    if len(names) > 1:
        problems.add(
            f"the keys hold several adapters, {', '.join(names)}; save one of them with "
            "save_pretrained's selected_adapters"
        )
        return []
    name = next(iter(names), "default")
    there = set(now.values())
    for key, plain in now.items():
        module, saved, rest = plain.partition(_SAVED)
        first, _, own = rest.partition(".")
        if saved and own and (first == name or (not names and f"{module}.{own}" in there)):
            shorter[key] = f"{module}{_SAVED}{own}"
    # Old DoRA magnitudes are written `lora_magnitude_vector.weight` without a name in them.
    now.update(shorter)
    return [f"keys carry the adapter's name, {name}; read without it"] if shorter else []


def _with_prefix(now: dict[str, str], _: Problems) -> list[str]:
    """Make the keys begin with `PREFIX`, where all of an adapter's parts have it further in, or none has it."""
    parts = [plain for plain in now.values() if plain.endswith(tuple(PARTS))]
    fronts = {plain.partition(PREFIX)[0] if PREFIX in plain else None for plain in parts}
    if len(fronts) != 1 or fronts == {""}:
        return []
    (front,) = fronts
    if front is None:
        for key, plain in now.items():
            now[key] = PREFIX + plain
        return [f"keys lack {PREFIX[:-1]}; read as if they had it"]
    if not front.endswith("."):
        return []
    for key, plain in now.items():
        now[key] = plain.removeprefix(front)
    return [f"keys were saved under {front[:-1]}; read without it"]
