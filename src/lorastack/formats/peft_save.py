"""Write an adapter as a PEFT folder, as ``PeftModel.from_pretrained`` reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lorastack.core import dtypes
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import KINDS
from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, is_text, shown
from lorastack.formats.peft import RECIPE_KEY
from lorastack.formats.peft_attention import as_peft_keeps_it
from lorastack.formats.peft_config import CONFIG_NAME
from lorastack.formats.peft_files import WEIGHTS
from lorastack.formats.peft_keys import PREFIX
from lorastack.formats.peft_parameters import inner_to_outer
from lorastack.formats.safetensors_save import Entry, kept, write_safetensors
from lorastack.formats.said_base import BASE, base_of
from lorastack.ways import BASE as GIVE_BASE
from lorastack.ways import CONVERT, drop_extras, ways

#: Extras that PEFT has no place for.
_NOT_HELD = ("norm", "lokr", "diff", "diff_b")
#: The version of PEFT that reads factors of experts as they are written here.
_LAYOUT = "0.19.0"
#: Fields that say what the adapter is for, which views and bakes leave true.
_KEPT = ("revision", "task_type", "auto_mapping", "fan_in_fan_out")


def save_peft(
    lora: LoadedLora,
    folder: Path,
    dtype: str | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``lora`` into the empty ``folder``; the caller moves the folder to its place.

    A scaling of its own per weight is written as ``alpha_pattern``, ranks as ``rank_pattern``.

    Raises
    ------
    FormatError
        Listing everything that a PEFT folder cannot hold.
    """
    dtype = dtypes.checked_name(dtype, ("f32", "f16", "bf16"))
    _check(lora)
    lora, inside = as_peft_keeps_it(lora)
    config = _config(lora, inside)
    try:
        said = orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise FormatError(f"{lora.name}: what {CONFIG_NAME} would say cannot be written as JSON: {error}") from error
    metadata = {"format": "pt"} | ({RECIPE_KEY: recipe} if recipe else {})
    write_safetensors(folder / WEIGHTS, list(_entries(lora, inside, dtype)), metadata, progress)
    (folder / CONFIG_NAME).write_bytes(said + b"\n")


def _check(lora: LoadedLora) -> None:
    problems = Problems(f"{lora.name} cannot be written as a PEFT folder")
    if lora.naming in ("gguf", "kohya"):
        problems.add(f"its weights have {'GGUF' if lora.naming == 'gguf' else 'kohya'} names{ways(CONVERT)}")
    if not lora.adapters:
        problems.add("it has no weights")
    for name, delta in lora.adapters.items():
        if delta.kind == "stored" and delta.num_experts:
            problems.add(f"weight {name}: which way round its experts are, only the base tells{ways(GIVE_BASE)}")
        if not _is_parameter(delta) and lora.naming != "kohya" and not name.endswith(".weight"):
            problems.add(f"weight {name}: its name does not end with .weight, which PEFT's modules have")
        if not is_text(name):
            problems.add(f"weight {shown(name)}: the name is no text that UTF-8 holds")
        if not abs(delta.scaling * delta.rank) <= dtypes.FLOAT32_MAX:
            problems.add(f"weight {name}: its alpha would be {delta.scaling * delta.rank:g}, which float32 cannot hold")
    named = lora.metadata.get("modules_to_save")
    if lora.extras.get("modules_to_save") and named is not None and not isinstance(named, list):
        problems.add(f"modules_to_save is {shown(named)}, expected names{ways(drop_extras('modules_to_save'))}")
    for kind in _NOT_HELD:
        for name in lora.extras.get(kind, {}):
            problems.add(f"{kind}: {KINDS[kind]}, {name}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)


def _config(lora: LoadedLora, inside: Collection[str]) -> dict[str, Any]:
    modules = {module_of(name): delta for name, delta in lora.adapters.items() if not _is_parameter(delta)}
    modules = {module: delta for module, delta in modules.items() if module not in inside}
    parameters = {name: delta for name, delta in lora.adapters.items() if _is_parameter(delta)}
    looked_up = modules | parameters  # in rank_pattern and alpha_pattern: by module, or by parameter with its name
    rank = Counter(delta.rank for delta in looked_up.values()).most_common(1)[0][0]
    alpha, rslora, odd = scalings(looked_up)
    config: dict[str, Any] = {key: lora.metadata[key] for key in _KEPT if lora.metadata.get(key)}
    if base := base_of(lora):
        config[BASE] = base
    else:
        config.pop("revision", None)  # which is the base's
    config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": whole(alpha),
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "rank_pattern": {pattern_key(m): d.rank for m, d in looked_up.items() if d.rank != rank},
        "alpha_pattern": {pattern_key(m): whole(alpha) for m, alpha in odd.items()},
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
        config["peft_version"] = _LAYOUT
    return config | _config_of_extras(lora)


def _config_of_extras(lora: LoadedLora) -> dict[str, Any]:
    """The fields without which PEFT would not look for the extras there are, and would look for those left out."""
    extras, said = lora.extras, lora.metadata
    config: dict[str, Any] = {
        "use_dora": bool(extras.get("dora")),
        "lora_bias": bool(extras.get("lora_bias")),
        "bias": said.get("bias", "none") if extras.get("bias") else "none",
    }
    if extras.get("modules_to_save") and isinstance(said.get("modules_to_save"), list):
        owners = {f".{name.rpartition('.')[0]}." for name in extras["modules_to_save"]}
        modules = [m for m in said["modules_to_save"] if isinstance(m, str)]
        config["modules_to_save"] = [m for m in modules if any(f".{m}." in owner for owner in owners)]
    if extras.get("new_tokens"):
        config["trainable_token_indices"] = said.get("trainable_token_indices")
    if tokens := extras.get("alora", {}).get("invocation_tokens"):
        config["alora_invocation_tokens"] = list(tokens)
    return config


def scalings(owners: Mapping[str, LoraDelta]) -> tuple[float, bool, dict[str, float]]:
    """(lora_alpha, use_rslora, alpha of the modules that need another): the simplest that is exact.

    PEFT computes alpha/rank, or alpha/√rank under rsLoRA, in float64.
    """
    for rslora in (False, True):

        def power(delta: LoraDelta, rslora: bool = rslora) -> float:
            return delta.rank**0.5 if rslora else float(delta.rank)

        alphas = {_tidy(d.scaling * power(d), d.scaling, power(d)) for d in owners.values()}
        if len(alphas) == 1:
            return alphas.pop(), rslora, {}
    common = Counter(_tidy(d.scaling * d.rank, d.scaling, d.rank) for d in owners.values()).most_common(1)[0][0]
    alphas_by_module = {m: _tidy(d.scaling * d.rank, d.scaling, d.rank) for m, d in owners.items()}
    return common, False, {m: a for m, a in alphas_by_module.items() if a != common}


def _tidy(alpha: float, scaling: float, divisor: float) -> float:
    """A whole alpha where it gives the same scaling: 15.999999999999998 is 16 less a rounding."""
    nearest = float(round(alpha)) if abs(alpha) < 1 << 53 else alpha
    return nearest if abs(nearest / divisor - scaling) <= 1e-15 * abs(scaling) else alpha


def whole(value: float) -> float | int:
    # Above 2**53 a float is no longer one certain whole number, and JSON's end at 64 bits.
    return int(value) if float(value).is_integer() and abs(value) <= 1 << 53 else value


def pattern_key(name: str) -> str:
    """A pattern that hits this module only: PEFT matches regular expressions against the end of every path."""
    return "^" + re.escape(name)


def _is_parameter(delta: LoraDelta) -> bool:
    """Whether PEFT writes the update of this weight under ``target_parameters``."""
    return delta.kind in ("experts", "stored")


def module_of(name: str) -> str:
    """The module path of a weight name."""
    return name.removesuffix(".weight")


def _entries(lora: LoadedLora, inside: Mapping[str, str], dtype: str | None) -> Iterator[Entry]:
    """``inside``: module -> where it lies in PEFT's model, of output projections of whole attentions."""
    inner = _inner_parameters(lora)
    for name, delta in lora.adapters.items():
        a, b = delta.factors
        if delta.kind == "experts":
            yield from _expert_entries(inner[name], a, b, dtype)
            continue
        module = inner.get(name) or inside.get(module_of(name)) or module_of(name)
        endings = ("lora_embedding_A", "lora_embedding_B") if delta.kind == "embedding" else (
            "lora_A.weight", "lora_B.weight")  # fmt: skip
        for factor, ending in zip((a, b), endings, strict=True):
            yield _entry(f"{PREFIX}{module}.{ending}", factor, dtype)
    endings_of = {"dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
    for kind, ending in endings_of.items():
        for name, factor in lora.extras.get(kind, {}).items():
            yield _entry(f"{PREFIX}{module_of(name)}.{ending}", factor, dtype)
    for name, (_, factor) in lora.extras.get("new_tokens", {}).items():
        yield _entry(f"{PREFIX}{module_of(name)}.token_adapter.trainable_tokens_delta", factor, dtype)
    targets = {module_of(name) for name in lora.adapters}
    for kind in ("bias", "base_weight", "modules_to_save"):
        for name, factor in lora.extras.get(kind, {}).items():
            module, _, part = name.rpartition(".")
            wrapped = ".base_layer" if kind != "modules_to_save" and module in targets else ""
            yield _entry(f"{PREFIX}{inside.get(module, module)}{wrapped}.{part}", factor, dtype)


def _entry(key: str, factor: Factor, dtype: str | None) -> Entry:
    kind = dtype or kept(factor)
    return key, factor.shape, kind, lambda: factor.cast(1.0, dtypes.numpy_type(kind))


def _inner_parameters(lora: LoadedLora) -> dict[str, str]:
    """Expert parameter -> path of the wrapper PEFT keeps its factors in: its first lies innermost."""
    by_module: dict[str, list[str]] = {}
    for name, delta in lora.adapters.items():
        if _is_parameter(delta):
            module, _, parameter = name.rpartition(".")
            by_module.setdefault(module, []).append(parameter)
    paths = {}
    for module, parameters in by_module.items():
        for depth, parameter in enumerate(reversed(inner_to_outer(parameters) or parameters)):
            paths[f"{module}.{parameter}"] = module + ".base_layer" * depth
    return paths


def _expert_entries(path: str, a: Factor, b: Factor, dtype: str | None) -> Iterator[Entry]:
    experts, rank, width = a.shape
    out = b.shape[1]

    def flat_a(array: np.ndarray) -> np.ndarray:
        return array.reshape(experts * rank, width)

    def flat_b(array: np.ndarray) -> np.ndarray:
        return array.transpose(1, 2, 0).reshape(out, rank * experts)

    yield _entry(f"{PREFIX}{path}.lora_A.weight", a.mapped(flat_a, (experts * rank, width)), dtype)
    yield _entry(f"{PREFIX}{path}.lora_B.weight", b.mapped(flat_b, (out, rank * experts)), dtype)
