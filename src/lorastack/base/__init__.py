"""What an adapter needs to know of its base: weight names, shapes, heads, row order."""

from lorastack.base.model import BaseModel, open_base
from lorastack.base.names import convert_names

__all__ = ["BaseModel", "convert_names", "open_base"]
