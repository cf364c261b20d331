"""LoraStack composes LoRA adapters: load any format, stack with scales, apply, bake or merge."""

from lorastack.adapter import LoadedLora, LoraAdapter
from lorastack.base import convert_names
from lorastack.delta import LoraDelta
from lorastack.errors import LoraStackError
from lorastack.formats import load, save
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
    "convert_names",
    "load",
    "save",
]
