"""Mixtures by row: every row of a batch has its own scales, as a matrix rows x adapters.

A layer's hidden vector ``H = X A_all^T`` has a part for every adapter; each row keeps what its mixture
says: ``where(S != 0, H * S, 0)``, so that Inf or NaN of an adapter that a row does not use cannot reach it.
The weights are read once, whatever the rows want.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorastack.errors import ShapeError

if TYPE_CHECKING:
    from lorastack.torch.layer import LiveLayer


class Mixture:
    """The scales of each row for each adapter, ``table [rows, adapters]``; and how tokens belong to rows.

    Parameters
    ----------
    index
        For packed input: the row of every token, ``[tokens]``. Without it the batch is split evenly, so
        that beams and returned sequences, which repeat rows, follow their row.
    """

    def __init__(self, table: torch.Tensor, index: torch.Tensor | None = None) -> None:
        self.table = table
        self.index = index
        self.active = [n for n in range(table.shape[1]) if bool((table[:, n] != 0).any())]

    def linear(self, layer: LiveLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The masked hidden vectors of ``x`` and the ``B`` they go with."""
        a, b, scales, mask = self._factors(layer)
        h = torch.nn.functional.linear(x, a)
        return self._mask(h, scales, mask), b

    def scale(self, layer: LiveLayer, h: torch.Tensor) -> torch.Tensor:
        """Hidden vectors of all of the layer's adapters, scaled row by row."""
        scales = layer_scales(layer, self.table, range(self.table.shape[1]))
        return self._mask(h, scales, scales != 0)

    def _factors(self, layer: LiveLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Factors of the adapters that some row uses, gathered once for each layer and composition."""
        if layer.mixed is None:
            used = [slot.entry in self.active for slot in layer.slots]
            scales = layer_scales(layer, self.table, self.active)
            if all(used):
                layer.mixed = (layer.a, layer.b, scales, scales != 0)
            else:
                ranks = torch.tensor([slot.rank for slot in layer.slots])
                picked = torch.repeat_interleave(torch.tensor(used), ranks).to(layer.a.device)
                layer.mixed = (layer.a[picked], layer.b[:, picked], scales, scales != 0)
        return layer.mixed

    def _mask(self, h: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, rank = scales.shape
        if self.index is not None:
            flat = h.reshape(-1, rank)
            if flat.shape[0] != self.index.shape[0]:
                raise ShapeError(f"a layer got {flat.shape[0]} tokens, the packed rows index {self.index.shape[0]}")
            index = self.index
            return torch.where(mask[index], flat * scales[index], 0).view(h.shape)
        tokens = h.numel() // rank if rank else 0
        if rows == 0 or tokens % rows:
            raise ShapeError(
                f"a layer got {tokens} tokens, which {rows} rows do not share evenly; is the batch {rows}?"
            )
        each = h.reshape(rows, tokens // rows, rank)
        return torch.where(mask[:, None], each * scales[:, None], 0).view(h.shape)


def layer_scales(layer: LiveLayer, table: torch.Tensor, active: list[int] | range) -> torch.Tensor:
    """``[rows, R]``: each row's scale times the scaling of every rank row of the layer's active adapters."""
    wanted = set(active)
    parts = [
        (table[:, slot.entry, None] * slot.scaling).expand(-1, slot.rank)
        for slot in layer.slots
        if slot.entry in wanted
    ]
    if not parts:
        return table.new_zeros((table.shape[0], 0)).to(layer.dtype)
    return torch.cat(parts, 1).to(device=layer.a.device, dtype=layer.dtype)
