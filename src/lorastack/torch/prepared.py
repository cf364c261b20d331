"""What is made ready for a layer before anything is changed: factors as tensors, and what goes with them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorastack.torch.dora import Dora
from lorastack.torch.places import Place


class Prepared(NamedTuple):
    """One adapter's update at one place, in the layer's type and on its device."""

    place: Place
    a: torch.Tensor
    b: torch.Tensor
    rank: int
    scaling: float
    dora: Dora | None = None
    bias: torch.Tensor | None = None
    #: False when NaN or Inf was let in: such factors must not even be multiplied by 0.
    finite: bool = True
    #: The tokens from which on it acts; None: everywhere.
    tokens: tuple[int, ...] | None = None


class Slot(NamedTuple):
    """The ranks of one adapter in a layer; ``entry`` is the adapter's position on the stack."""

    entry: int
    #: Where its ranks begin.
    first: int
    rank: int
    scaling: float
    dora: Dora | None
    bias: torch.Tensor | None
    finite: bool = True
    tokens: tuple[int, ...] | None = None
