"""What an adapter needs to know of its base: weight names, shapes, heads, row order."""

from lorastack.base.model import BaseModel
from lorastack.base.names import convert_names
from lorastack.base.opening import open_base

__all__ = ["BaseModel", "convert_names", "open_base"]
