"""LoraStack composes LoRA adapters: load any format, stack with scales, apply, bake or merge."""

from lorastack.adapter import LoadedLora, LoraAdapter
from lorastack.delta import LoraDelta
from lorastack.errors import LoraStackError
from lorastack.formats import load
from lorastack.stack import LoraStack
from lorastack.target import TargetModule

__version__ = "0.1.0"

__all__ = [
    "LoadedLora",
    "LoraAdapter",
    "LoraDelta",
    "LoraStack",
    "LoraStackError",
    "TargetModule",
    "load",
]
