"""GGUF names <-> Hugging Face names, with the rows that the conversion moves.

The names come from ``gguf``'s own tensor name map, which is many to one: towards GGUF it is used as it
is, towards Hugging Face the base's own key list is mapped forward and inverted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np

from lorastack.base.architectures import Architecture
from lorastack.base.gguf_experts import gguf_experts, hf_experts
from lorastack.base.hint import in_short
from lorastack.base.latent import join, split
from lorastack.base.model import BaseModel
from lorastack.base.opening import open_base
from lorastack.base.row_order import row_order, rows_misfit
from lorastack.base.settle import settle
from lorastack.base.spelling import TEXT_PARTS
from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas
from lorastack.core.target import Naming, TargetModule, place_of
from lorastack.errors import ArgumentError, NamingError, Problems, UnsupportedError
from lorastack.ways import SELECT, drop_extras, ways


def convert_names(lora: LoadedLora, base: BaseModel | str, to: Naming | None = None) -> LoadedLora:
    """The same adapter under the other kind of names, its rows in that kind's order. Nothing is copied.

    Parameters
    ----------
    base
        The model it was trained on: a Hugging Face folder, a hub id, or a GGUF file. From GGUF names to
        Hugging Face names it must be a Hugging Face base, whose key list the names come from.
    to
        ``"gguf"`` or ``"hf"``; the other kind than the adapter's when not given. The adapter's own kind settles it
        under the names of this base: those of an older save, or of a backbone saved by itself, become today's.

    Raises
    ------
    NamingError
        Listing every weight that has no place in the base, or another shape there.
    UnsupportedError
        When the architecture's row order is not known, or an extra cannot be converted.
    """
    base = base if isinstance(base, BaseModel) else open_base(base)
    to = to or ("hf" if lora.naming in ("gguf", "kohya") else "gguf")
    if to not in ("gguf", "hf"):
        raise ArgumentError(f"names are converted to 'gguf' or 'hf', not to {to!r}")
    if lora.naming == "kohya":
        lora = _from_kohya(lora, base)
    if lora.naming == to:
        return settle(lora, base)
    if lora.naming == "own":
        raise NamingError(f"{lora.name} has names of its own; only GGUF and Hugging Face names can be converted")
    arch = base.architecture
    _check_architecture(lora, base, arch)
    lora = split(gguf_experts(settle(lora, base), base), base) if to == "gguf" else join(hf_experts(lora, base), base)
    names = to_gguf_names(lora, base) if to == "gguf" else to_hf_names(lora, base)
    _check_shapes(lora, base, names)
    _check_rows(lora, base, names if to == "gguf" else {name: name for name in names})

    def rows(old: str) -> Any:
        gguf_name = names[old] if to == "gguf" else old
        return row_order(base, gguf_name, to)

    back = {new: old for old, new in names.items()}

    def build(new: str, old: str) -> LoraDelta:
        return move_rows(lora.adapters[old], rows(old))

    metadata = _hf_metadata(base)
    if to == "gguf":
        metadata = {"general.architecture": arch.gguf, "base_model_name_or_path": base.name}
    return replace(
        lora,
        adapters=LazyDeltas(back, build),
        extras=MappingProxyType(_convert_extras(lora, names, rows)),
        metadata=MappingProxyType(metadata),
        naming=to,
        history=(*lora.history, ("names", to)),
        # What the file says of itself stays known; a plain dict, which can be pickled.
        as_loaded=lora.as_loaded or (lora.naming, dict(lora.metadata)),
    )


def _from_kohya(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """The adapter under the base's own names; NamingError lists the weights that have none."""
    if base.naming != "hf":
        raise NamingError(
            f"{lora.name} has kohya names; which weights they are, only the list of a Hugging Face base says, and "
            f"{base.name} is a GGUF file"
        )
    settled = settle(lora, base)
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    for name in settled.adapters:
        if base.shape_of(name) is None:
            problems.add(f"weight {name} is none of the base's {base.count} weights")
    problems.lines = in_short(problems.lines, lora, base)
    problems.raise_any(NamingError)
    return settled


def lora_of_adapter(adapter: LoraAdapter, base: BaseModel, naming: Naming | None, name: str) -> LoadedLora:
    """An adapter known by (target module, layer) under the base's weight names; its row order is Hugging Face's.

    Raises
    ------
    UnsupportedError
        When it does not say which layers it covers.
    NamingError
        Listing the places that the base lacks.
    """
    layers = getattr(adapter, "layers", None)
    if layers is None:
        raise UnsupportedError(
            f"{type(adapter).__name__} has no ``layers``, so its weights cannot be listed; add them to bake it"
        )
    places = names_of_places(base, adapter)
    problems = Problems(f"{type(adapter).__name__} does not fit base {base.name}")
    deltas: dict[str, LoraDelta] = {}
    for target in adapter.target_modules:
        for layer in layers:
            delta = adapter.delta(target, layer)
            if delta is None:
                continue
            key = places.get((target, layer))
            if key is None:
                problems.add(f"{target} of layer {layer} is none of the base's weights")
            else:
                deltas[key] = delta.scaled(adapter.alpha / adapter.rank)
    problems.raise_any(NamingError)
    naming = naming or base.naming
    if base.naming == "gguf":
        # Named as GGUF names them, but still in Hugging Face's row order.
        for key, delta in deltas.items():
            deltas[key] = move_rows(delta, row_order(base, key, "gguf"))
    lora = LoadedLora(name, MappingProxyType(deltas), naming=base.naming, metadata=_metadata(base))
    return lora if naming == base.naming else convert_names(lora, base, naming)


def names_of_places(base: BaseModel, adapter: LoraAdapter) -> dict[tuple[TargetModule, int], str]:
    """(target module, layer) -> the base's weight there; of a model with pictures or sound, those of its text part.

    Raises
    ------
    NamingError
        Listing every place that the adapter covers and the base has twice, as in an encoder and a decoder.
    """
    places: dict[tuple[TargetModule, int], str] = {}
    problems = Problems(f"{type(adapter).__name__} does not fit base {base.name}")
    for name in base.shapes:
        place = place_of(name) if name.startswith(base.text_prefix) else None
        if place is None:
            continue
        if place in places and adapter.delta(*place) is not None:
            problems.add(f"{place[0]} of layer {place[1]} is {places[place]} and {name}; use an adapter by weight name")
        places[place] = name
    problems.raise_any(NamingError)
    return places


def _metadata(base: BaseModel) -> Mapping[str, Any]:
    said = _hf_metadata(base) if base.naming == "hf" else {"general.architecture": base.architecture_name}
    return MappingProxyType(said)


def move_rows(delta: LoraDelta, permute: Any) -> LoraDelta:
    """``delta`` with the rows of its lora_B moved."""
    if permute is None:
        return delta
    a, b = delta.factors
    return LoraDelta(a, b.mapped(permute, b.shape), delta.scaling, delta.kind)


def to_gguf_names(lora: LoadedLora, base: BaseModel) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight; NamingError lists those that have none."""
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in lora.adapters:
        found = gguf_name(name, base)
        if found is None and base.text_prefix and not name.startswith(base.text_prefix):
            problems.add(
                f"weight {name} is not of the text part; llama.cpp keeps pictures and sound in a file of its own "
                f"(mmproj), which takes no adapter{ways(SELECT)}"
            )
        elif lora.adapters[name].kind == "conv":
            problems.add(f"weight {name} is a convolution, to which llama.cpp adds no update{ways(SELECT)}")
        elif found is None:
            problems.add(f"weight {name} has no GGUF name in architecture {base.architecture.gguf}")
        elif found in taken:
            problems.add(f"weights {taken[found]} and {name} are both {found}")
        elif base.naming == "gguf" and found not in base.shapes:
            problems.add(f"weight {name} is {found}, which the base lacks")
        elif problem := tied_in_gguf(found, base):
            problems.add(f"weight {name}: {problem}")
        else:
            names[name] = found
            taken[found] = name
    problems.lines = in_short(problems.lines, lora, base)
    problems.raise_any(NamingError)
    return names


def gguf_name(name: str, base: BaseModel) -> str | None:
    """The GGUF name of a weight by its Hugging Face name; None where the architecture has none."""
    if name.startswith("blk."):  # experts and latent attention, which are named already
        return name
    table = _name_map(base.architecture.gguf, base.layers)
    # A text part, and a backbone saved by itself, are named as the text model is.
    plain = [name.removeprefix(part) for part in TEXT_PARTS if name.startswith(part)][:1] or [name]
    spelt = [name, *(f"{prefix}{plain[0]}" for prefix in ("", f"{base.architecture.prefix or 'model'}."))]
    if base.text_prefix and not name.startswith(base.text_prefix) and plain[0] != "lm_head.weight":
        return None
    # gguf knows Granite's router as files have it.
    spelt += [one.replace(".block_sparse_moe.router.", ".block_sparse_moe.router.layer.") for one in spelt]
    found = next((found for one in spelt if (found := table.get_name(one, try_suffixes=(".weight",)))), None)
    return found if found and found.endswith(".weight") else None  # Mamba's A is kept as its exponential


def tied_in_gguf(name: str, base: BaseModel) -> str | None:
    """Why an update of this GGUF tensor cannot be used where head and embedding are one; None where it can."""
    if name == "token_embd.weight" and (bool(base.tied) if base.naming == "hf" else "output.weight" not in base.shapes):
        return (
            "the base ties its head to the embedding, which is one tensor in GGUF: llama.cpp aborts on an update of it "
            "and would change the head along" + ways(SELECT, "untie the base")
        )
    if name == "output.weight" and base.tied:
        return f"the base ties its head to the embedding, so that its GGUF has no output.weight{ways(SELECT)}"
    return None


def to_hf_names(lora: LoadedLora, base: BaseModel) -> dict[str, str]:
    """GGUF name -> the base's own key of every weight; NamingError lists those that have none."""
    if base.naming != "hf":
        raise NamingError(
            f"{lora.name} has GGUF names; Hugging Face names come from the key list of a Hugging Face base, and "
            f"{base.name} is a GGUF file: give the folder or hub id it was converted from"
        )
    known = hf_keys(base)
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    names: dict[str, str] = {}
    for name in lora.adapters:
        if name in known:
            names[name] = known[name]
        elif name in base.shapes:  # named by the base already: experts joined into its own parameter
            names[name] = name
        else:
            problems.add(f"weight {name} is none of the base's {base.count} weights")
    problems.lines = in_short(problems.lines, lora, base)
    problems.raise_any(NamingError)
    return names


def hf_keys(base: BaseModel) -> dict[str, str]:
    """GGUF name -> the base's own key, for every key that has a GGUF name."""
    return {found: key for key in base.shapes if key not in base.tied and (found := gguf_name(key, base))}


@lru_cache(maxsize=8)
def _name_map(arch: str, layers: int) -> gguf.TensorNameMap:
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    return gguf.get_tensor_name_map(number, layers)


def _check_architecture(lora: LoadedLora, base: BaseModel, arch: Architecture) -> None:
    said = lora.metadata.get("general.architecture")
    if lora.naming == "gguf" and said is not None and said != arch.gguf:
        raise NamingError(f"{lora.name} is for architecture {said!r}, base {base.name} is {arch.gguf!r}")


def _check_shapes(lora: LoadedLora, base: BaseModel, names: Mapping[str, str]) -> None:
    """Rows can be moved only where they are the base's own: NamingError lists the weights that are not."""
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    for old, new in names.items():
        if problem := base.misfit(old if old in base.shapes else new, lora.adapters[old]):
            problems.add(problem)
    problems.lines = in_short(problems.lines, lora, base)
    problems.raise_any(NamingError)


def _check_rows(lora: LoadedLora, base: BaseModel, names: Mapping[str, str]) -> None:
    """Rows move by heads: NamingError lists the weights that the base's number of heads does not divide."""
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    for name, found in names.items():
        rows = lora.adapters[name].out_features
        if problem := rows_misfit(base, found, rows):
            problems.add(f"weight {name}: {problem}, which the base's configuration says it has")
    problems.raise_any(NamingError)


def _hf_metadata(base: BaseModel) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base.name,
        "fan_in_fan_out": base.architecture_name == "GPT2LMHeadModel",
        "task_type": "CAUSAL_LM",
    }


def _convert_extras(lora: LoadedLora, names: Mapping[str, str], rows: Any) -> dict[str, dict[str, Any]]:
    """Extras by weight move with it; others are the user's to drop."""
    converted: dict[str, dict[str, Any]] = {}
    lost: list[str] = []
    for kind, values in lora.extras.items():
        if kind in ("dora", "lora_bias"):
            converted[kind] = {
                n: _rows_of(factor, rows(old)) for old, factor in values.items() if (n := names.get(old))
            }
            lost += [f"{kind}: {name}" for name in values if name not in names]
        elif kind == "alora":
            converted[kind] = dict(values)
        elif kind != "base_weight":  # which changes nothing
            lost += [f"{kind}: {name}" for name in values]
    if lost:
        raise UnsupportedError(f"{lora.name} has extras whose names cannot be converted{ways(drop_extras())}", lost)
    return converted


def _rows_of(factor: Factor, permute: Any) -> Factor:
    if permute is None:
        return factor

    def change(array: np.ndarray) -> np.ndarray:
        return permute(array.reshape(-1)).reshape(array.shape)

    return factor.mapped(change, factor.shape)
