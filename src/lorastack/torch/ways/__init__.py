"""Ways to compute the rows of a layer with a plan: one file each.

A way is an object with a name and one method, ``add(layer, running, x, output, in_place)``, which gives ``output`` plus
every row's own sum. Which one a layer has is said in `choice`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from lorastack.torch.passes import Pass
from lorastack.torch.tiles import Layout


class Layer(Protocol):
    """What of a layer a way reads."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    layout: Layout
    #: Whether there are factors that may not be multiplied by 0.
    in_order: bool
    #: Its own way, without one asked for.
    way: Any
    #: The layers that are expected to have the same input, after this one.
    followers: list[Any]


class Way(Protocol):
    """One way to compute a layer's rows."""

    name: str

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        """``output [..., out]`` plus each row's sum at ``x [..., in]``; in place where that is said to be allowed."""
        ...
