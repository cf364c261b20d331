"""Read kohya's files, and ComfyUI's spelling of them: a module's factors with an alpha of its own.

A kohya name is the module's path with ``_`` for ``.`` behind ``lora_unet_``, ``lora_te_`` and the like (sd-scripts,
networks/lora.py): which path it is, only a base can tell, so that it stays as it is here. ComfyUI writes the path of
the model's own code behind ``diffusion_model.``.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorastack.core.adapter import LoadedLora
from lorastack.core.lazy import LazyDeltas
from lorastack.core.target import Naming
from lorastack.errors import FormatError, Problems
from lorastack.formats.modules import Modules
from lorastack.formats.peft import NOTES_KEY
from lorastack.formats.tensors import Tensors

#: Where an adapter's metadata keeps which format its file has, where that is not told by its names.
FORMAT_KEY = "lorastack.format"


def load(tensors: Tensors, name: str | None = None, allow_nonfinite: bool = False) -> LoadedLora:
    """The adapter in an open file: the header is checked, factors and alphas stay in the file.

    Raises
    ------
    FormatError
        Listing every tensor that is no part of an update read here.
    """
    problems = Problems(f"cannot load {tensors.path}")
    modules = Modules(tensors, weight_of, allow_nonfinite, problems)
    problems.raise_any(FormatError)
    flat = any("." not in weight for values in (modules.how, *modules.extras.values()) for weight in values)
    return made(tensors, modules, "kohya" if flat else "hf", "kohya" if flat else "ComfyUI", name)


def made(tensors: Tensors, modules: Modules, naming: Naming, kind: str, name: str | None) -> LoadedLora:
    """The adapter that sorted modules of a file are."""
    metadata: dict[str, Any] = {**tensors.metadata, FORMAT_KEY: kind}
    if notes := (*tensors.notes, *modules.notes):
        metadata[NOTES_KEY] = notes
    return LoadedLora(
        name=name or Path(tensors.path).stem,
        adapters=LazyDeltas(modules.how, modules.build),
        extras=MappingProxyType({kind: MappingProxyType(values) for kind, values in modules.extras.items()}),
        metadata=MappingProxyType(metadata),
        naming=naming,
        source=tensors.path,
        opened=tensors.files,
    )


def weight_of(module: str) -> str:
    """The weight's name: a kohya name is a module's, and stays as it is; a path gets the parameter's name."""
    return module if "." not in module else f"{module}.weight"
