"""Many synthetic adapters, and whether two comparisons of them are the same; a program that asks Ray, for one test."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np

from lorastack import LoadedLora, LoraStack
from lorastack.algebra.compare import Comparison, compare
from lorastack.algebra.pairs import NUMBERS

WEIGHTS = {f"model.layers.{n}.self_attn.q_proj.weight": (48, 40) for n in range(6)}


def many(count: int, rank: int = 2, shapes: dict[str, tuple[int, int]] = WEIGHTS) -> LoraStack:
    rng = np.random.default_rng(5)

    def one(n: int) -> LoadedLora:
        pairs = {
            name: (rng.standard_normal((rank, wide), np.float32), rng.standard_normal((out, rank), np.float32))
            for name, (out, wide) in shapes.items()
        }
        return LoadedLora.from_tensors(pairs, name=f"a{n}", naming="hf")

    return LoraStack([(one(n), 0.5 + n / count) for n in range(count)])


def differing(one: Comparison, other: Comparison, names: Iterable[str] = NUMBERS) -> list[str]:
    """The numbers of two comparisons that are not the same to the bit."""
    found = [name for name in names if not np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)]
    found += [name for name in ("adapters", "weights", "norm") if getattr(one, name) != getattr(other, name)]
    by_weight = len(one.names) >= 100 or one.to_dict(by_weight=True) == other.to_dict(by_weight=True)
    return found if by_weight else [*found, "by weight"]


if __name__ == "__main__":
    from lorastack.fleet.workers import on_ray

    stack = many(int(sys.argv[1]), shapes=dict(list(WEIGHTS.items())[:2]))
    found = differing(compare(stack), compare(stack, run=on_ray("local")))
    sys.exit(f"not the same: {found}") if found else print("the same")
