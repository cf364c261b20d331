"""LoraStack composes LoRA adapters: load any format, stack with scales, apply, bake or merge."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorastack.base import convert_names as convert_names
    from lorastack.base.blocks import block_weights as block_weights
    from lorastack.converting import convert as convert
    from lorastack.core.adapter import LoadedLora as LoadedLora
    from lorastack.core.adapter import LoraAdapter as LoraAdapter
    from lorastack.core.delta import LoraDelta as LoraDelta
    from lorastack.core.stack import LoraStack as LoraStack
    from lorastack.core.target import TargetModule as TargetModule
    from lorastack.errors import LoraStackError as LoraStackError
    from lorastack.errors import LoraStackWarning as LoraStackWarning
    from lorastack.extracting import extract as extract
    from lorastack.formats import save as save
    from lorastack.merging import merge as merge
    from lorastack.recipe import load as load
    from lorastack.torch.tune import tune as tune

__version__ = "0.2.0"

#: Name -> the module that has it. Each is imported when it is first asked for, so that what needs little starts soon.
_HOMES = {
    "LoadedLora": "core.adapter",
    "LoraAdapter": "core.adapter",
    "LoraDelta": "core.delta",
    "LoraStack": "core.stack",
    "LoraStackError": "errors",
    "LoraStackWarning": "errors",
    "TargetModule": "core.target",
    "block_weights": "base.blocks",
    "convert": "converting",
    "convert_names": "base",
    "extract": "extracting",
    "load": "recipe",
    "merge": "merging",
    "save": "formats",
    "tune": "torch.tune",
}
# `import *` does not load torch.
__all__ = [  # noqa: PLE0604, RUF100
    "LoadedLora",
    "LoraAdapter",
    "LoraDelta",
    "LoraStack",
    "LoraStackError",
    "LoraStackWarning",
    "TargetModule",
    "block_weights",
    "convert",
    "convert_names",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
