"""LoraStack composes LoRA adapters: load any format, stack with scales, apply, bake or merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorastack.base import convert_names
from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.delta import LoraDelta
from lorastack.core.stack import LoraStack
from lorastack.core.target import TargetModule
from lorastack.errors import LoraStackError
from lorastack.formats import save
from lorastack.recipe import load

if TYPE_CHECKING:
    from lorastack.merging import merge as merge
    from lorastack.torch.tune import tune as tune

__version__ = "0.1.0"

__all__ = [
    "LoadedLora",
    "LoraAdapter",
    "LoraDelta",
    "LoraStack",
    "LoraStackError",
    "TargetModule",
    "convert_names",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    # Not in __all__: `import *` would load what few programs need, torch above all.
    if name == "merge":
        from lorastack.merging import merge

        return merge
    if name == "tune":
        from lorastack.torch import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
