"""Shrunk: what an input of a pass came to, for the layers that share it - q, k and v, or gate and up.

Which layers do is seen in a pass, and foreseen from then on: the first one's shrink is theirs too. Each checks that its
own input is that very tensor, unchanged since, and computes its own where it is not, as in cross-attention.
"""

from __future__ import annotations

import weakref

import torch

from lorastack.torch.ways import Layer


class Shrunk:
    """The partial sums at one input: for each layer that is expected to have it too, one for each board."""

    def __init__(self, x: torch.Tensor, leader: Layer, parts: dict[int, list[torch.Tensor]]) -> None:
        self.leader, self._parts = leader, parts
        # Not held: it would be in memory until others come.
        self._x, self._version = weakref.ref(x), x._version

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether this is that very input, as it was."""
        return self._x() is x and x._version == self._version

    def take(self, layer: Layer) -> list[torch.Tensor] | None:
        """The sums of ``layer``; None when they have to be computed, in this pass and not in the next."""
        parts = self._parts.pop(id(layer), None)
        if parts is None:
            self._expect(layer)
        return parts

    def _expect(self, layer: Layer) -> None:
        leader = self.leader
        alike = leader.a.shape[1] == layer.a.shape[1] and leader.a.dtype == layer.a.dtype
        if alike and leader.a.device == layer.a.device and layer is not leader and layer not in leader.followers:
            leader.followers.append(layer)
