"""Bake: a whole stack as one ordinary adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorastack.adapter import LoadedLora
from lorastack.algebra.combine import cat, largest
from lorastack.base import BaseModel, open_base
from lorastack.base.fit import misfits
from lorastack.base.names import lora_of_adapter
from lorastack.delta import LoraDelta
from lorastack.errors import ArgumentError, NamingError, Problems, UnsupportedError
from lorastack.extras import HARMLESS, KINDS
from lorastack.target import Naming

if TYPE_CHECKING:
    from lorastack.stack import LoraStack


def bake(stack: LoraStack, base: BaseModel | str | Path | None = None, name: str | None = None) -> LoadedLora:
    """See `LoraStack.bake`."""
    if stack.is_empty():
        raise ArgumentError("the stack is empty, so there is nothing to bake; push an adapter first")
    base = base if isinstance(base, BaseModel) or base is None else open_base(base)
    entries = [(entry_name, lora, scale) for entry_name, (lora, scale) in zip(stack.names, stack.entries, strict=True)]
    entries += _from_adapters(stack, base)
    _refuse_extras(entries)
    architectures = {arch for _, lora, _ in entries if (arch := lora.metadata.get("general.architecture"))}
    if len(architectures) > 1:
        raise NamingError(f"the adapters are for different architectures: {', '.join(sorted(architectures))}")
    naming = entries[0][1].naming
    weights = dict.fromkeys(weight for _, lora, _ in entries for weight in lora.adapters)
    problems = Problems("the stack cannot be baked")
    deltas: dict[str, LoraDelta] = {}
    # One scaling for all weights: programs that know one alpha and one rank for the whole file (vLLM,
    # llama.cpp) must compute the same.
    common = largest((scale, delta) for _, lora, scale in entries for delta in lora.adapters.values()) or 1.0
    for weight in weights:
        found = [(n, scale, lora.adapters[weight]) for n, lora, scale in entries if weight in lora.adapters]
        try:
            deltas[weight] = cat([(scale, delta) for _, scale, delta in found], [n for n, _, _ in found], common)
        except ValueError as error:
            problems.add(f"{weight}: {error}".replace("\n", "\n  "))
    problems.raise_any(UnsupportedError)
    baked = LoadedLora(
        name=name or "+".join(entry_name for entry_name, _, _ in entries),
        adapters=MappingProxyType(deltas),
        metadata=MappingProxyType(_metadata([lora for _, lora, _ in entries], base, naming)),
        naming=naming,
        origin=tuple((lora, scale) for _, lora, scale in entries),
    )
    if base is not None:
        problems = Problems(f"the stack does not fit base {base.name}")
        for line in misfits(baked, base):
            problems.add(line)
        problems.raise_any(NamingError)
    return baked


def _from_adapters(stack: LoraStack, base: BaseModel | None) -> list[tuple[str, LoadedLora, float]]:
    """The second list by weight name, in the naming of the first."""
    if not stack.adapters:
        return []
    if base is None:
        raise ArgumentError(
            f"{len(stack.adapters)} adapters are known by (target module, layer) only; give bake() the base, "
            "whose weight names they get"
        )
    taken = len(stack)
    return [
        (f"adapter{n}", lora_of_adapter(adapter, base, stack.naming, f"adapter{n}"), 1.0)
        for n, adapter in enumerate(stack.adapters, taken)
    ]


def _refuse_extras(entries: list[tuple[str, LoadedLora, float]]) -> None:
    problems = Problems("bake() holds low-rank updates only")
    for name, lora, _ in entries:
        for kind, values in lora.extras.items():
            if kind not in HARMLESS:
                count = f"{len(values)} of them, such as {next(iter(values))}"
                problems.add(f"{name}: {kind}, {KINDS[kind]} ({count}); leave it out with without_extras({kind!r})")
    problems.raise_any(UnsupportedError)


def _metadata(loras: list[LoadedLora], base: BaseModel | None, naming: Naming) -> Mapping[str, Any]:
    """What every adapter of the stack agrees on, and what the base says."""
    keys = ("general.architecture", "base_model_name_or_path", "task_type", "fan_in_fan_out")
    agreed = {}
    for key in keys:
        values = [lora.metadata[key] for lora in loras if lora.metadata.get(key) is not None]
        if values and all(value == values[0] for value in values):
            agreed[key] = values[0]
    if base is not None and base.naming == "hf":
        agreed["base_model_name_or_path"] = base.name
    if base is not None and naming == "gguf":
        agreed.setdefault(
            "general.architecture", base.architecture_name if base.naming == "gguf" else base.architecture.gguf
        )
    return agreed
