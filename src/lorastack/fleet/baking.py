"""Baking: a mixture of a library as the one adapter that an engine takes, within the rank it was started for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lorastack.base import BaseModel, open_base
from lorastack.converting import fitting
from lorastack.converting.fold import one_rank, one_scaling
from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError, UnsupportedError
from lorastack.recipe import Recipe
from lorastack.targets import Target, program_of, room_for

#: Stored types of two bytes; all others are written with four at most.
_NARROW = frozenset("float16 bfloat16 f16 bf16".split())
#: Bytes beside the numbers: what a file says of a tensor, and of itself with its recipe.
_PER_TENSOR, _PER_FOLDER = 512, 1 << 14


@dataclass(frozen=True)
class Baking:
    """How mixtures are baked.

    Attributes
    ----------
    base
        The model that they are for, or where it is: an adapter that does not fit it is refused. An engine would serve
        half of it, or the base alone, without a word.
    target
        The engine: a row of `lorastack.targets` that reads PEFT folders.
    max_rank
        The rank that the engine was started for; None for any.
    tolerance
        The relative error that a cut to that rank may cost; 0 refuses what has a larger one.
    uniform
        One rank for all weights, filled up with zeros, also where the engine takes several.
    """

    base: BaseModel | str | Path
    target: str = "vllm"
    max_rank: int | None = None
    tolerance: float = 0.0
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.row.format != "peft":
            raise ArgumentError(f"a cache holds PEFT folders, which {self.row.title} does not read")
        if self.max_rank is not None and self.max_rank < 1:
            raise ArgumentError(f"max_rank is {self.max_rank}, expected 1 or more")
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance is {self.tolerance}, expected a relative error from 0 to below 1")

    @property
    def row(self) -> Target:
        """What the engine can hold."""
        return program_of(self.target)

    @property
    def how(self) -> dict[str, object]:
        """What a baked mixture depends on beside its adapters and scales."""
        return {
            "base": str(self.base.name if isinstance(self.base, BaseModel) else self.base),
            "target": self.target,
            "max_rank": self.max_rank,
            "tolerance": self.tolerance,
            "uniform": self.uniform,
        }

    def opened(self) -> BaseModel:
        """The base."""
        return self.base if isinstance(self.base, BaseModel) else open_base(self.base)

    def bake(self, recipe: Recipe, name: str, base: BaseModel) -> LoadedLora:
        """The mixture as one adapter under the base's names; numbers are read when it is saved, or to cut its rank.

        Raises
        ------
        LoraStackError
            With the reason, when the base or the engine cannot hold it.
        """
        stack = recipe.stack(base=base, naming=base.naming)
        lora = stack.bake(base, name)
        if self.max_rank is not None and lora.rank > self.max_rank:
            lora = self._cut(stack.bake(base, name, rank=self.max_rank) if self.tolerance else None, lora.rank, name)
        lora = fitting(lora, self.row, base)
        return one_rank(one_scaling(lora)) if self.uniform else lora

    def _cut(self, cut: LoadedLora | None, rank: int, name: str) -> LoadedLora:
        room = room_for(self.row, rank)
        larger = f"start {self.row.title} with a maximum rank of {room or rank} or more"
        if cut is None:
            raise UnsupportedError(
                f"{name} has rank {rank}, {self.row.title} was started for {self.max_rank}; {larger}, or allow an "
                "error by a tolerance"
            )
        error = float(cut.made["error"])
        if error > self.tolerance:
            raise UnsupportedError(
                f"{name} has rank {rank}, {self.row.title} was started for {self.max_rank}: cut to that it would be "
                f"{error:.2%} off, and {self.tolerance:.2%} are allowed; {larger}"
            )
        return cut


def bytes_of(lora: LoadedLora) -> int:
    """What a folder of it takes at most."""
    factors = [factor for delta in lora.adapters.values() for factor in delta.factors]
    numbers = sum(math.prod(factor.shape) * (2 if factor.stored.lower() in _NARROW else 4) for factor in factors)
    sources = sum(len(str(part.source)) + 512 for part, _ in lora.origin)
    return numbers + len(factors) * _PER_TENSOR + sources + _PER_FOLDER
