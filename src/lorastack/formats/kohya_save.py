"""Write an adapter as kohya's programs and ComfyUI read it: one safetensors file, an alpha for every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorastack.core import dtypes
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, is_text, shown
from lorastack.formats.kohya_names import has_several_text, kohya_name
from lorastack.formats.modules import bias_of
from lorastack.formats.peft import RECIPE_KEY
from lorastack.formats.safetensors_save import Entry, kept, write_safetensors
from lorastack.ways import Way, drop_extras, ways

#: What a file says of its training and its model, which stays true.
_KEPT = ("ss_", "modelspec.")
#: What it says of its own numbers, which does not.
_OF_NUMBERS = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "modelspec.hash_sha256", "modelspec.thumbnail")
_HELD = frozenset({"dora", "diff", "diff_b", "lokr"})
_CONVERT = Way("convert it with convert_names(lora, base)", "give --base to convert it")


def save_kohya(
    lora: LoadedLora,
    path: Path,
    dtype: str | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
    comfyui: bool = False,
) -> None:
    """Write ``lora`` to ``path``; the caller moves the file to its place.

    ``comfyui`` keeps names of the model's own code with their dots.

    Raises
    ------
    FormatError
        Listing everything that the format cannot hold.
    """
    dtype = dtypes.checked_name(dtype, ("f32", "f16", "bf16"))
    names = _names(lora, comfyui)
    entries = list(_entries(lora, names, dtype))
    ranks = {delta.rank for delta in lora.adapters.values()}
    metadata = {
        key: value
        for key, value in lora.metadata.items()
        if isinstance(value, str) and key.startswith(_KEPT) and key not in _OF_NUMBERS and is_text(value)
    }
    metadata["ss_network_module"] = "networks.lora"
    metadata["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    if recipe:
        metadata[RECIPE_KEY] = recipe
    write_safetensors(path, entries, metadata, progress)


def _names(lora: LoadedLora, comfyui: bool) -> dict[str, str]:
    """Weight name -> the module's name in the file."""
    problems = Problems(f"{lora.name} cannot be written as {'ComfyUI reads it' if comfyui else 'a kohya file'}")
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    every = [*lora.adapters, *(n for kind in ("diff", "lokr") for n in lora.extras.get(kind, {}))]
    stems = [name.removesuffix(".bias") for name in lora.extras.get("diff_b", {})]
    every += [f"{stem}.weight" if "." in stem else stem for stem in stems]
    several = has_several_text(every)
    for name in dict.fromkeys(every):
        found = _comfyui_name(name) if comfyui else _flat_name(name, lora, several)
        if found is None:
            problems.add(f"weight {shown(name)}: no such model's weight has a name there{ways(_CONVERT)}")
        elif found in taken:
            problems.add(f"weights {taken[found]} and {name} are both {found}")
        else:
            names[name] = found
            taken[found] = name
    if not every:
        problems.add("it has no weights")
    for name, delta in lora.adapters.items():
        if delta.kind not in ("linear", "conv"):
            problems.add(f"weight {name} is of {delta.kind}; only linear layers and convolutions have a place there")
        if not abs(delta.scaling * delta.rank) <= dtypes.FLOAT32_MAX:
            problems.add(f"weight {name}: its alpha would be {delta.scaling * delta.rank:g}, which float32 cannot hold")
        if any(name in lora.extras.get(kind, {}) for kind in ("diff", "lokr")):
            problems.add(f"weight {name} has a low-rank update and a full one")
    for kind, values in lora.extras.items():
        if kind not in _HELD and kind not in HARMLESS:
            problems.add(f"{kind}: {KINDS[kind]}, such as {next(iter(values))}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)
    return names


def _flat_name(name: str, lora: LoadedLora, several: bool) -> str | None:
    if "." not in name:
        return name if lora.naming == "kohya" else None
    return kohya_name(name, several) if is_text(name) else None


def _comfyui_name(name: str) -> str | None:
    return name.removesuffix(".weight") if name.startswith(("diffusion_model.", "text_encoders.")) else None


def _entries(lora: LoadedLora, names: Mapping[str, str], dtype: str | None) -> Iterator[Entry]:
    for name, delta in lora.adapters.items():
        yield from _pair(names[name], delta, dtype)
    for name, factor in lora.extras.get("dora", {}).items():
        ones = 1 if lora.adapters[name].kind == "linear" else len(lora.adapters[name].factors[0].shape) - 1
        size = lora.adapters[name].out_features
        yield entry(f"{names[name]}.dora_scale", _reshaped(factor, (size, *(1 for _ in range(ones)))), dtype)
    for name, factor in lora.extras.get("diff", {}).items():
        yield entry(f"{names[name]}.diff", factor, dtype)
    own = {bias_of(name): module for name, module in names.items()}
    for name, factor in lora.extras.get("diff_b", {}).items():
        yield entry(f"{own[name]}.diff_b", factor, dtype)
    for name, product in lora.extras.get("lokr", {}).items():
        yield entry(f"{names[name]}.lokr_w1", product.w1, dtype, product.scaling)
        yield entry(f"{names[name]}.lokr_w2", product.w2, dtype)


def _pair(module: str, delta: LoraDelta, dtype: str | None) -> Iterator[Entry]:
    """The factors and the alpha of one module; an alpha that would be 0, which means the rank, goes into lora_up."""
    a, b = delta.factors
    alpha = np.float32(delta.scaling * delta.rank)
    folded = abs(alpha) < dtypes.FLOAT32_TINY
    yield entry(f"{module}.lora_down.weight", a, dtype)
    yield entry(f"{module}.lora_up.weight", b, dtype, delta.scaling if folded else 1.0)
    value = np.array(delta.rank if folded else alpha, np.float32)
    yield f"{module}.alpha", (), "f32", lambda: value


def _reshaped(factor: Factor, shape: tuple[int, ...]) -> Factor:
    return factor.mapped(partial(np.reshape, shape=shape), shape)


def entry(key: str, factor: Factor, dtype: str | None, times: float = 1.0, **how: Any) -> Entry:
    """A factor under its key, in the type asked for or its own, each number multiplied."""
    kind = dtype or kept(factor)
    return key, factor.shape, kind, lambda: factor.cast(times, dtypes.numpy_type(kind), **how)
