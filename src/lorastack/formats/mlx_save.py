"""Write an adapter as mlx-lm reads it: adapters.safetensors and adapter_config.json, one rank and one scale for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lorastack.core import dtypes
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.core.factor import Factor
from lorastack.errors import Failures, FormatError, Problems, is_text, shown
from lorastack.formats.mlx import EXPERTS, WEIGHTS
from lorastack.formats.peft import RECIPE_KEY
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.peft_save import module_of
from lorastack.formats.safetensors_save import Entry, kept, write_safetensors
from lorastack.formats.said_base import base_of
from lorastack.ways import CONVERT, drop_extras, ways

_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
_LAYERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.(.+)")


def save_mlx(
    lora: LoadedLora,
    folder: Path,
    dtype: str | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``lora`` into the empty ``folder``; the caller moves the folder to its place.

    Smaller ranks are filled up with zeros, scalings that differ are folded into lora_b.

    Raises
    ------
    FormatError
        Listing everything that the format cannot hold.
    """
    dtype = dtypes.checked_name(dtype, ("f32", "f16", "bf16"))
    _check(lora)
    found = {delta.scaling for delta in lora.adapters.values()}
    scale = found.pop() if len(found) == 1 else 1.0
    entries = list(_entries(lora, scale, dtype))
    keys = sorted({_key(name.rpartition(".")[0]) for name, *_ in entries})
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if lora.extras.get("dora") else "lora",
        "num_layers": -1,  # all of them
        "lora_parameters": {"rank": lora.rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    if base := base_of(lora):
        config["model"] = base
    write_safetensors(folder / WEIGHTS, entries, {RECIPE_KEY: recipe} if recipe else {}, progress)
    (folder / CONFIG_NAME).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")


def _check(lora: LoadedLora) -> None:
    problems = Problems(f"{lora.name} cannot be written as MLX reads it")
    if lora.naming in ("gguf", "kohya"):
        problems.add(f"its weights have {lora.naming} names{ways(CONVERT)}")
    if not lora.adapters:
        problems.add("it has no weights")
    for name, delta in lora.adapters.items():
        if delta.kind not in ("linear", "embedding"):
            what = {"conv": "a convolution", "experts": "experts in one parameter"}[delta.kind]
            problems.add(f"weight {name} is {what}, which MLX has no place for")
        elif not name.endswith(".weight") or not is_text(name):
            problems.add(f"weight {shown(name)}: its name does not end with .weight, which MLX's modules have")
    magnitudes = lora.extras.get("dora", {})
    if magnitudes and set(magnitudes) != set(lora.adapters):
        problems.add(f"dora: {len(magnitudes)} of {len(lora.adapters)} weights have a magnitude; MLX has them at all")
    for kind, values in lora.extras.items():
        if kind != "dora" and kind not in HARMLESS:
            problems.add(f"{kind}: {KINDS[kind]}, such as {next(iter(values))}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)


def _key(module: str) -> str:
    """A module as mlx-lm looks for it: inside a layer, or whole."""
    match = _LAYER.fullmatch(module)
    return match[1] if match else module


def _entries(lora: LoadedLora, scale: float, dtype: str | None) -> Iterator[Entry]:
    rank = lora.rank
    groups: dict[str, dict[int, LoraDelta]] = {}
    for name, delta in lora.adapters.items():
        module = module_of(name)
        if match := _EXPERT.fullmatch(module):
            layer = f"{match[1]}{EXPERTS}{_LAYERS.get(match[3], match[3])}"
            groups.setdefault(layer, {})[int(match[2])] = delta
            continue
        a, b = delta.factors
        times = 1.0 if delta.scaling == scale else delta.scaling / scale
        for part, factor, own in (("lora_a", a, 1.0), ("lora_b", b, times)):
            kind = dtype or kept(factor)
            shape = (a.shape[1], rank) if part == "lora_a" else (rank, b.shape[0])
            yield f"{module}.{part}", shape, kind, partial(_turned, factor, own, kind, shape)
    for layer, experts in groups.items():
        yield from _of_experts(layer, experts, rank, scale, dtype)
    for name, factor in lora.extras.get("dora", {}).items():
        kind = dtype or kept(factor)
        yield f"{module_of(name)}.m", factor.shape, kind, partial(factor.cast, 1.0, dtypes.numpy_type(kind))


def _turned(factor: Factor, times: float, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    array = factor.cast(times, dtypes.numpy_type(kind)).T
    if array.shape == shape:
        return np.ascontiguousarray(array)
    whole: np.ndarray = np.zeros(shape, array.dtype)
    whole[: array.shape[0], : array.shape[1]] = array
    return whole


def _of_experts(
    layer: str, experts: Mapping[int, LoraDelta], rank: int, scale: float, dtype: str | None
) -> Iterator[Entry]:
    """The experts of a layer in one; those that are absent are zero."""
    first = next(iter(experts.values()))
    count = 1 + max(experts)
    shapes = {(delta.in_features, delta.out_features) for delta in experts.values()}
    if len(shapes) > 1 or count > 4 * len(experts) + 64:
        raise FormatError(f"{layer}: its experts {sorted(experts)[:5]} differ in shape, or most are not there")
    for part, shape in ((0, (count, rank, first.in_features)), (1, (count, first.out_features, rank))):
        kind = dtype or kept(first.factors[part])

        def filled(part: int = part, shape: tuple[int, ...] = shape, kind: str = kind) -> np.ndarray:
            whole: np.ndarray = np.zeros(shape, dtypes.numpy_type(kind))
            failures = Failures(f"{layer} cannot be written")
            for number, delta in experts.items():
                times = 1.0 if part == 0 or delta.scaling == scale else delta.scaling / scale
                one = failures.get(partial(delta.factors[part].cast, times, whole.dtype))
                if one is not None:
                    whole[number, : one.shape[0], : one.shape[1]] = one
            failures.raise_any()
            return whole

        yield f"{layer}.lora_{'ab'[part]}", shape, kind, filled
