"""DoRA on a live layer: the changed weight's rows rescaled to a trained magnitude.

Liu et al. 2024 (arXiv:2402.09353), and PEFT's order of several adapters: each one acts on the result of
those before it,

    result += scale * ((m / n - 1) * (result - bias) + (m / n) * scaling * B A x),   n = ||W + scaling B A||

PEFT has no scale of a stack; at 1 this is what it computes. A scale interpolates between the base and
the adapter, so that 0 is the base.
"""

from __future__ import annotations

from typing import Any

import torch

from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.torch.places import Place, is_conv1d
from lorastack.torch.tensors import to_torch


class Dora:
    """The ratio magnitude / norm of one adapter at one layer, computed once."""

    def __init__(self, place: Place, delta: LoraDelta, magnitude: Factor, dtype: torch.dtype) -> None:
        module: Any = place.module
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = module.weight.detach().to(wide)
        weight = weight.t() if is_conv1d(module) or place.kind == "embedding" else weight
        a, b = (to_torch(factor, wide, place.device) for factor in delta.factors)
        flat = weight.reshape(weight.shape[0], -1)
        if place.kind == "conv" and module.groups > 1:
            norm = (flat + delta.scaling * _grouped(a, b, module.groups).reshape(flat.shape)).norm(dim=1)
        else:
            norm = row_norms(flat, a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1), delta.scaling)
        m = to_torch(magnitude, wide, place.device).reshape(-1)
        trailing = [1] * (weight.dim() - 2)  # a convolution's channels come before its positions
        self.ratio = (m / norm).to(dtype).view(-1, *trailing)
        bias = getattr(module, "bias", None)
        self.base_bias = None if bias is None else bias.detach().to(dtype).view(-1, *trailing)

    def change(self, result: torch.Tensor, y: torch.Tensor, scaling: float, scaled: torch.Tensor) -> torch.Tensor:
        """What this adapter adds to ``result``; ``y`` is B A x, ``scaled`` the stack's scale times ``scaling``."""
        base = result if self.base_bias is None else result - self.base_bias
        return scaled * ((self.ratio - 1) / scaling * base + self.ratio * y)


def _grouped(a: torch.Tensor, b: torch.Tensor, groups: int) -> torch.Tensor:
    """What PEFT takes the norms of where a convolution has groups: the factors' numbers, each put into one matrix."""
    out, rank = b.shape[:2]
    rows, ranks = out // groups, rank // groups
    own = torch.cat([b[g * rows : (g + 1) * rows, g * ranks : (g + 1) * ranks] for g in range(groups)])
    return own.reshape(-1, rank) @ a.reshape(rank, -1)


def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``||W + scaling B A||`` row by row, ``[out]``, without forming ``B A``.

    ``|w|^2 + 2 s w.(bA) + s^2 (bA).(bA)``, in float64 since the terms can cancel.
    """
    square = weight.double().square().sum(1)
    cross = ((weight @ a.t()).double() * b.double()).sum(1)
    gram = a.double() @ a.double().t()
    own = ((b.double() @ gram) * b.double()).sum(1)
    return (square + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt().to(weight.dtype)
