"""Write an adapter as diffusers' ``load_lora_weights`` reads it, scalings in the header's ``lora_adapter_metadata``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from lorastack.core import dtypes
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.errors import FormatError, Problems, is_text, shown
from lorastack.formats.diffusers import COMPONENTS, METADATA_KEY
from lorastack.formats.kohya_save import entry
from lorastack.formats.peft import RECIPE_KEY
from lorastack.formats.peft_save import module_of, scalings, whole
from lorastack.formats.safetensors_save import write_safetensors
from lorastack.ways import Way, drop_extras, ways

_CONVERT = Way("convert it with convert_names(lora, base)", "give --base to convert it")
#: diffusers takes a magnitude without `.weight` too, and transformers then loses it in a text encoder.
_ENDINGS = {"dora": "lora_magnitude_vector.weight", "lora_bias": "lora_B.bias"}


def save_diffusers(
    lora: LoadedLora,
    path: Path,
    dtype: str | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``lora`` to ``path``; the caller moves the file to its place.

    Where every scaling is 1, which diffusers takes for granted, nothing is said of it.

    Raises
    ------
    FormatError
        Listing everything that the format cannot hold.
    """
    dtype = dtypes.checked_name(dtype, ("f32", "f16", "bf16"))
    _check(lora)
    entries = []
    for name, delta in lora.adapters.items():
        for factor, part in zip(delta.factors, "AB", strict=True):
            entries.append(entry(f"{module_of(name)}.lora_{part}.weight", factor, dtype))
    for kind, ending in _ENDINGS.items():
        for name, factor in lora.extras.get(kind, {}).items():
            entries.append(entry(f"{module_of(name)}.{ending}", factor, dtype))
    metadata = {"format": "pt"} | ({RECIPE_KEY: recipe} if recipe else {})
    if any(delta.scaling != 1 for delta in lora.adapters.values()):
        metadata[METADATA_KEY] = orjson.dumps(_configs(lora), option=orjson.OPT_SORT_KEYS).decode()
    write_safetensors(path, entries, metadata, progress)


def _check(lora: LoadedLora) -> None:
    problems = Problems(f"{lora.name} cannot be written as diffusers reads it")
    if not lora.adapters:
        problems.add("it has no weights")
    for name, delta in lora.adapters.items():
        if name.partition(".")[0] not in COMPONENTS or not name.endswith(".weight") or not is_text(name):
            problems.add(f"weight {shown(name)}: it is under no model of a pipeline, as unet. is{ways(_CONVERT)}")
        if delta.kind not in ("linear", "conv"):
            problems.add(f"weight {name} is of {delta.kind}; only linear layers and convolutions have a place there")
        if not abs(delta.scaling * delta.rank) <= dtypes.FLOAT32_MAX:
            problems.add(f"weight {name}: its alpha would be {delta.scaling * delta.rank:g}, which float32 cannot hold")
    parts: dict[str, dict[str, set[str]]] = {kind: {} for kind in _ENDINGS}
    for kind in _ENDINGS:  # a component has them everywhere or nowhere, as its configuration says
        for name in lora.extras.get(kind, {}):
            parts[kind].setdefault(name.partition(".")[0], set()).add(name)
        for component, names in parts[kind].items():
            every = {name for name in lora.adapters if name.startswith(f"{component}.")}
            if names != every:
                problems.add(f"{kind}: {len(names)} of {len(every)} weights of {component} have one, not all")
    for kind, values in lora.extras.items():
        if kind not in _ENDINGS and kind not in HARMLESS:
            problems.add(f"{kind}: {KINDS[kind]}, such as {next(iter(values))}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)


def _configs(lora: LoadedLora) -> dict[str, Any]:
    """The fields of every component's PEFT configuration, as diffusers packs them: ``unet.r``."""
    components: dict[str, dict[str, LoraDelta]] = {}
    for name, delta in lora.adapters.items():
        component, _, path = module_of(name).partition(".")
        components.setdefault(component, {})[path] = delta
    said: dict[str, Any] = {}
    for component, modules in components.items():
        fields = _config(modules)
        fields["use_dora"] = any(name.startswith(f"{component}.") for name in lora.extras.get("dora", {}))
        fields["lora_bias"] = any(name.startswith(f"{component}.") for name in lora.extras.get("lora_bias", {}))
        said |= {f"{component}.{field}": value for field, value in fields.items()}
    return said


def _config(modules: Mapping[str, LoraDelta]) -> dict[str, Any]:
    # Patterns are matched against the end of a path; transformers 5 has taken CLIP's `text_model.` from its beginning.
    rank = Counter(delta.rank for delta in modules.values()).most_common(1)[0][0]
    alpha, rslora, odd = scalings(modules)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": whole(alpha),
        "use_rslora": rslora,
        "bias": "none",
        "target_modules": sorted(path.removeprefix("text_model.") for path in modules),
        "rank_pattern": {_pattern(path): delta.rank for path, delta in modules.items() if delta.rank != rank},
        "alpha_pattern": {_pattern(path): whole(alpha) for path, alpha in odd.items()},
    }


def _pattern(path: str) -> str:
    own = path.removeprefix("text_model.")
    return re.escape(own) if own != path else "^" + re.escape(path)
