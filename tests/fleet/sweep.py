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


def same(one: Comparison, other: Comparison, names: Iterable[str] = NUMBERS) -> None:
    for name in names:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.adapters, one.weights, one.norm) == (other.adapters, other.weights, other.norm)
    if len(one.names) < 100:
        assert one.to_dict(by_weight=True) == other.to_dict(by_weight=True)


if __name__ == "__main__":
    from lorastack.fleet.workers import on_ray

    stack = many(int(sys.argv[1]), shapes=dict(list(WEIGHTS.items())[:2]))
    same(compare(stack), compare(stack, run=on_ray("local")))
    print("the same")
