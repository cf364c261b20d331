"""Scales: one vector of every rank row's multiplier, of which each layer has a view."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Scales:
    """``s = scaling * scale`` for every rank row of every layer, rewritten in place when a scale changes.

    The layers' views stay the same tensors, so that compiled code and captured graphs stay valid.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []

    def lay_out(self, layers: list[Any], scales: list[float]) -> None:
        """Give every layer its view, after adapters came or went."""
        by_type: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
        for layer in layers:
            by_type.setdefault((layer.dtype, layer.place.device), []).append(layer)
        self._groups = []
        for (dtype, device), group in by_type.items():
            slots = [slot for layer in group for slot in layer.slots]
            ranks = [slot.rank for slot in slots]
            entry = np.repeat(np.array([slot.entry for slot in slots], np.int64), ranks)
            scaling = np.repeat(np.array([slot.scaling for slot in slots], np.float32), ranks)
            flat = torch.empty(len(entry), dtype=dtype, device=device)
            for layer, view in zip(group, torch.split(flat, [layer.rank for layer in group]), strict=True):
                layer.s = view
            self._groups.append((flat, entry, scaling))
        self.write(scales)

    def write(self, scales: list[float]) -> None:
        """Rewrite every multiplier for these scales, one for each entry.

        In NumPy: on a busy machine torch's threads would wait for each other longer than this takes.
        """
        table = np.array(scales or [0.0], np.float32)
        with torch.no_grad():
            for flat, entry, scaling in self._groups:
                flat.copy_(torch.from_numpy(table[entry] * scaling))
