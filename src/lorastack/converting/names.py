"""The names that a format has for an adapter's weights: those of the base, of a pipeline's models, or kohya's."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from lorastack.algebra.entries import Entry, check_fit
from lorastack.base import convert_names
from lorastack.base.known_paths import known_path
from lorastack.base.model import BaseModel
from lorastack.base.parts import ADAPTED
from lorastack.converting.originals import under_original_names
from lorastack.core.adapter import LoadedLora
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import NamingError, Problems
from lorastack.formats.modules import bias_of
from lorastack.formats.writers import Format
from lorastack.ways import Way, ways

#: Formats whose names have a pipeline's model in front.
_OF_PIPELINES = ("kohya", "diffusers")
#: An image model's transformer, and not a language model's body.
_OF_IMAGES = re.compile(r"transformer\.((single_)?transformer_blocks\.|blocks\.\d+\.(attn[12]|ffn\.net)\.)")
_BASE = Way("give base=, the model it was trained on", "give --base, the model it was trained on")
_SELECT = Way("convert one of them with lora.select('unet.*')", "convert one of them with --select 'unet.*'")


def named_for(lora: LoadedLora, format: Format, base: BaseModel | None) -> LoadedLora:
    """The adapter under the names that ``format`` has.

    Raises
    ------
    NamingError
        Listing every weight that has no such name, or none that can be told without the base.
    """
    if format == "gguf":
        return lora if lora.naming == "gguf" and base is None else _with_base(lora, base, "gguf")
    if base is not None:
        lora = _with_base(lora, base, "hf")
    elif lora.naming == "gguf":
        _with_base(lora, base, "hf")
    elif lora.naming == "kohya" and format != "kohya":
        lora = _of_known_models(lora)
    if format == "comfyui":
        own = all(name.startswith(("diffusion_model.", "text_encoders.")) for name in lora.adapters)
        return lora if own else under_original_names(_in_pipeline(lora, base), base)
    if format in _OF_PIPELINES:
        return _in_pipeline(lora, base)
    return _alone(lora) if format in ("peft", "mlx") else lora


def _with_base(lora: LoadedLora, base: BaseModel | None, to: str) -> LoadedLora:
    if base is None:
        raise NamingError(
            f"{lora.name} has {'Hugging Face' if to == 'gguf' else 'GGUF'} names, and only its base says which weights "
            f"they are{ways(_BASE)}"
        )
    if lora.naming != "own":
        lora = convert_names(lora, base, "gguf" if to == "gguf" else "hf")
    check_fit([Entry(lora.name, lora, 1.0)], base)
    return lora


def _of_known_models(lora: LoadedLora) -> LoadedLora:
    """kohya's names as a pipeline's, where they are those of a well-known model."""
    problems = Problems(f"{lora.name} cannot be converted without its base")
    names: dict[str, str] = {}
    every = [*lora.adapters, *(n for kind in ("diff", "lokr", "diff_b") for n in lora.extras.get(kind, {}))]
    for name in dict.fromkeys(every):
        stem = name.removesuffix(".bias").removesuffix(".weight")
        found = known_path(stem)
        if found is None:
            problems.add(f"weight {name} is of no model that is known well enough to say where its dots were")
        else:
            names[name] = bias_of(found) if name.endswith(".bias") else found
    if problems.lines:
        more = len(problems.lines) - 10
        problems.lines = [
            *problems.lines[:10],
            *([f"and {more} more"] if more > 0 else []),
            ways(_BASE, lead="").strip(),
        ]
    problems.raise_any(NamingError)
    return _renamed(lora, names)


def _in_pipeline(lora: LoadedLora, base: BaseModel | None) -> LoadedLora:
    """Names with a pipeline's model in front, where they are those of one of its models alone."""
    if lora.naming == "kohya" or any(name.partition(".")[0] in ADAPTED for name in lora.adapters):
        return lora
    kind = str(base.config.get("_class_name", "")) if base else ""
    model = "unet" if "UNet" in kind else "transformer" if "Transformer" in kind else ""
    if not model:
        return lora  # the writer says that they are under no model of a pipeline
    return lora.with_weights_renamed({"": model})


def _alone(lora: LoadedLora) -> LoadedLora:
    """Names without the pipeline's model, which a file of one model does not have."""
    fronts = dict.fromkeys(name.partition(".")[0] for name in lora.adapters)
    if not any(front in ADAPTED for front in fronts):
        return lora
    if len(fronts) > 1:
        raise NamingError(
            f"{lora.name} changes several models of a pipeline, {', '.join(fronts)}; this format holds those of one"
            f"{ways(_SELECT)}"
        )
    if "transformer" in fronts and not any(map(_OF_IMAGES.match, lora.adapters)):
        return lora  # GPT-2 and others call their own body so
    return lora.with_weights_renamed({next(iter(fronts)): ""})


def _renamed(lora: LoadedLora, names: dict[str, str]) -> LoadedLora:
    back = {names[name]: name for name in lora.adapters}
    extras = {
        kind: MappingProxyType({names.get(name, name): value for name, value in values.items()})
        for kind, values in lora.extras.items()
    }
    return replace(
        lora,
        adapters=LazyDeltas(back, lambda _, old: lora.adapters[old]),
        extras=MappingProxyType(extras),
        naming="hf",
        history=(*lora.history, ("names", "hf")),
    )
