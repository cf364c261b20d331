"""What one adapter does: norm, rank and spectrum of its update at each weight, and overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class WeightMeasure:
    """One update, ``scale * scaling * B @ A``, of one weight.

    The experts of one weight are measured as the block-diagonal matrix they are: its singular values are those of
    all experts together, and norm and ranks follow from them.

    Attributes
    ----------
    name, shape
        The weight, and ``(out, in)`` of the update, for experts ``(experts, out, in)``.
    rank
        The numerical rank: singular values above 1e-6 of the largest.
    norm
        The Frobenius norm of the update.
    relative
        That norm over the Frobenius norm of the base's weight; None without the base.
    spectrum
        The singular values, descending, those that are numerically zero left out.
    intruders, examined
        How many of the ``examined`` leading singular vectors of base + update are intruders; None without the base.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    relative: float | None
    spectrum: tuple[float, ...]
    intruders: int | None = None
    examined: int | None = None

    @property
    def stable_rank(self) -> float:
        """``norm² / sigma_1²`` (Rudelson and Vershynin 2007): how many directions as strong as the first there are."""
        return float(sum((s / self.spectrum[0]) ** 2 for s in self.spectrum)) if self.spectrum else 0.0

    @property
    def effective_rank(self) -> float:
        """``exp(H(p))``, the entropy of ``p = sigma / sum of sigma`` (Roy and Vetterli 2007); 0 of no update at all."""
        if not self.spectrum:
            return 0.0
        total = sum(self.spectrum)
        shares = [s / total for s in self.spectrum]
        return math.exp(-sum(p * math.log(p) for p in shares if p > 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        ranks = {"stable_rank": self.stable_rank, "effective_rank": self.effective_rank}
        return asdict(self) | ranks | {"shape": list(self.shape), "spectrum": list(self.spectrum)}


@dataclass(frozen=True)
class AdapterMeasure:
    """One adapter at its scale, over all its weights.

    Attributes
    ----------
    name, scale
        As on the stack.
    weights
        One measure for each weight that the adapter has, in the stack's order.
    norm
        ``sqrt(sum of norm²)`` over the weights.
    relative
        That over the same norm of the base's weights which the adapter changes; None without the base.
    left_out
        What the adapter holds beside low-rank updates (DoRA, biases, ...), none of which is in any number; a line each.
    """

    name: str
    scale: float
    weights: tuple[WeightMeasure, ...]
    norm: float
    relative: float | None
    left_out: tuple[str, ...] = ()

    @property
    def stable_rank(self) -> float:
        """The mean over the weights that it does change."""
        return _mean([one.stable_rank for one in self.weights if one.rank])

    @property
    def effective_rank(self) -> float:
        """The mean over the weights that it does change."""
        return _mean([one.effective_rank for one in self.weights if one.rank])

    @property
    def intruders(self) -> int | None:
        """The sum over the weights; None where they were not looked for."""
        found = [one.intruders for one in self.weights if one.intruders is not None]
        return sum(found) if found else None

    @property
    def examined(self) -> int | None:
        """How many leading singular vectors were looked at in all."""
        found = [one.examined for one in self.weights if one.examined is not None]
        return sum(found) if found else None

    def strongest(self, count: int = 3) -> tuple[WeightMeasure, ...]:
        """The weights it changes most, relative to the base's where that is known."""
        order = sorted(self.weights, key=lambda one: -(one.norm if one.relative is None else one.relative))
        return tuple(order[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "name": self.name,
            "scale": self.scale,
            "norm": self.norm,
            "relative": self.relative,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "intruders": self.intruders,
            "examined": self.examined,
            "strongest": [one.name for one in self.strongest()],
            "left_out": list(self.left_out),
            "weights": [one.to_dict() for one in self.weights],
        }


def measure_weight(
    name: str,
    shape: tuple[int, int, int],
    sigmas: Sequence[np.ndarray],
    base_norm: float | None = None,
    intruders: tuple[int, int] | None = None,
) -> WeightMeasure:
    """The measure of one weight from the singular values of its matrices (several for experts).

    ``shape`` is ``(matrices, out, in)``, ``base_norm`` the Frobenius norm of the base's weight, ``intruders`` how many
    there are and of how many vectors.
    """
    sigma = np.sort(np.concatenate(sigmas))[::-1]
    norm = float(np.linalg.norm(sigma))
    return WeightMeasure(
        name=name,
        shape=shape[1:] if shape[0] == 1 else shape,
        rank=len(sigma),
        norm=norm,
        relative=None if base_norm is None else _ratio(norm, base_norm),
        spectrum=tuple(sigma.tolist()),
        intruders=None if intruders is None else intruders[0],
        examined=None if intruders is None else intruders[1],
    )


def measure_adapter(
    name: str,
    scale: float,
    weights: Sequence[WeightMeasure],
    base_norm: float | None = None,
    left_out: Sequence[str] = (),
) -> AdapterMeasure:
    """The measure of one adapter from those of its weights; ``base_norm`` is over the weights that it has."""
    norm = math.hypot(*(one.norm for one in weights))
    relative = None if base_norm is None else _ratio(norm, base_norm)
    return AdapterMeasure(name, scale, tuple(weights), norm, relative, tuple(left_out))


def _ratio(norm: float, base: float) -> float:
    return norm / base if base else (math.inf if norm else 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
