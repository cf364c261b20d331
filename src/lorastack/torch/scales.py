"""Scales: one vector of every rank row's multiplier, of which each layer has a view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lorastack.errors import ArgumentError, Problems, UnsupportedError
from lorastack.torch.prepared import Prepared
from lorastack.ways import Way, ways

_WIDER = Way("attach in another type, with dtype=torch.float32", None)


class Scales:
    """``s = scaling * scale`` for every rank row of every layer, rewritten in place when a scale changes.

    The layers' views stay the same tensors, so that compiled code and captured graphs stay valid.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []
        #: For each group: its type, and the largest multiplier at scale 1 of each entry.
        self._most: list[tuple[torch.dtype, np.ndarray]] = []

    def state(self) -> Any:
        """What `restore` brings back, all but the numbers, which `write` computes."""
        return self._groups, self._most

    def restore(self, state: Any) -> None:
        """Be as `state` found it."""
        self._groups, self._most = state

    def lay_out(self, layers: list[Any], scales: list[float]) -> None:
        """Give every layer its view, after adapters came or went."""
        by_type: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
        for layer in layers:
            by_type.setdefault((layer.dtype, layer.place.device), []).append(layer)
        groups, most = [], []
        for (dtype, device), group in by_type.items():
            ends = np.cumsum([layer.rank for layer in group])
            entry = np.zeros(ends[-1], np.int64)
            scaling = np.zeros(ends[-1], _wide(dtype))  # and 0 for ranks that are nobody's
            flat = torch.empty(len(entry), dtype=dtype, device=device)
            for layer, end in zip(group, ends.tolist(), strict=True):
                start = end - layer.rank
                layer.s = flat[start:end]
                for slot in layer.slots:
                    own = slice(start + slot.first, start + slot.first + slot.rank)
                    entry[own], scaling[own] = slot.entry, slot.scaling
            groups.append((flat, entry, scaling))
            most.append((dtype, np.zeros(len(scales), scaling.dtype)))
            np.maximum.at(most[-1][1], entry, np.abs(scaling))
        self._groups, self._most = groups, most
        self.write(scales)

    def write(self, scales: list[float]) -> None:
        """Rewrite every multiplier for these scales, one for each entry.

        In NumPy: on a busy machine torch's threads would wait for each other longer than this takes.
        """
        for flat, entry, scaling in self._groups:
            table = np.array(scales or [0.0], scaling.dtype)
            flat.copy_(torch.from_numpy(table[entry] * scaling))

    def check(self, scales: Sequence[float], names: Sequence[str]) -> None:
        """ArgumentError that lists the adapters whose multipliers are infinite in the type that a layer computes in."""
        problems = Problems("these scales cannot be set")
        for dtype, most in self._most:
            with np.errstate(over="ignore"):
                large = np.abs(np.array(scales, most.dtype) * most) > torch.finfo(dtype).max
            for n in np.flatnonzero(large).tolist():
                problems.add(f"{names[n]}: scale {scales[n]:g} times its scaling is infinite in {_name(dtype)}")
        if problems:
            problems.subject += ways(_WIDER)
        problems.raise_any(ArgumentError)

    @staticmethod
    def check_parts(parts: Iterable[Prepared], scale: float, dtype: torch.dtype | None) -> None:
        """UnsupportedError that lists the weights whose multiplier is infinite in the type their layer computes in."""
        problems = Problems("it cannot be computed" + ways(_WIDER))
        for part in parts:
            own = dtype or part.place.dtype
            if abs(part.scaling) > (most := torch.finfo(own).max) or abs(part.scaling * scale) > most:
                problems.add(
                    f"weight {part.place.name}: scaling {part.scaling:g} times scale {scale:g} is infinite in "
                    f"{_name(own)}"
                )
        problems.raise_any(UnsupportedError)


def _wide(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
