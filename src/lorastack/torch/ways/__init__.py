"""Ways to compute the rows of a layer with a plan: one file each.

A way is an object with one method, ``add(layer, running, x, output, in_place)``, which gives ``output`` plus every
row's own sum. Which one a layer has depends on the layer and on the handle, never on the batch, so that a row is the
same to the bit whatever its neighbours are.
"""

from __future__ import annotations

from typing import Protocol

import torch

from lorastack.torch.passes import Pass
from lorastack.torch.tiles import Layout


class Layer(Protocol):
    """What of a layer a way reads."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    layout: Layout


class Way(Protocol):
    """One way to compute a layer's rows."""

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        """``output [..., out]`` plus each row's sum at ``x [..., in]``; in place where that is said to be allowed."""
        ...
