"""Dense: ``H = X A_all^T`` for all factors, ``where(S != 0, H * S, 0)``, ``H B_all``: plain torch on any device.

It reads every factor once, whatever the rows want: best while there are few. A product's row does not depend on
the other rows' numbers, and what another row wants is an exact 0 here. Factors with NaN or Inf would not be: times 0
they are NaN, so a layer that has some is computed in another way.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lorastack.torch.passes import Pass
from lorastack.torch.ways import Layer


class Dense:
    """Two products over all factors; what gradients go through, and compiled code without Triton."""

    name = "dense"

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        layout = layer.layout
        a, b = layer.a.to(layout.dtype), layer.b.to(layout.dtype)
        x = x.to(a.dtype)
        h = running.mixture.masked(layout, running, F.linear(x, a), x, layer.name).reshape(-1, layout.total)
        if in_place and output.dtype == h.dtype:
            output.view(-1, output.shape[-1]).addmm_(h, b)
            return output
        flat = output.reshape(-1, output.shape[-1]).to(h.dtype)
        return torch.addmm(flat, h, b).to(output.dtype).view(output.shape)


DENSE = Dense()
