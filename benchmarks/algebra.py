"""Factor algebra: a truncated bake against PEFT's ``svd``, resizing a whole model, and where the dense way begins.

Run: python benchmarks/algebra.py [--sides 2048 4096]

PEFT decomposes the dense product, which takes minutes at 4096; each round of it is run once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from timing import once

from lorastack import LoadedLora, LoraStack
from lorastack.algebra import lowrank
from lorastack.algebra.compare import compare

RANK = 16


def two(side: int, rank: int = RANK) -> LoraStack:
    rng = np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors(
            {"w": (rng.standard_normal((rank, side), np.float32), rng.standard_normal((side, rank), np.float32))}
        )
        for _ in range(2)
    ]
    return LoraStack([(loras[0], 0.7), (loras[1], 0.3)])


def ours(side: int) -> list[float]:
    stack = two(side)
    return [once(lambda: stack.bake(rank=RANK)) for _ in range(20)]


def theirs(side: int, rounds: int) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(side, side, bias=False)

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["lin"], init_lora_weights=False)
    model = get_peft_model(One(), config, adapter_name="a0")
    model.add_adapter("a1", config)

    def combine(name: str) -> None:
        model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], name, combination_type="svd", svd_rank=RANK)

    return [once(lambda n=n: combine(f"both{n}")) for n in range(rounds)]


def high_water() -> float:
    """The most memory this process has held, in MiB; what getrusage says is inherited from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(who: str, side: int) -> float:
    """MiB that one call adds to the peak of a process of its own."""
    code = (
        f"import sys; sys.path[:0] = {sys.path[:1]!r}; import algebra; import torch, peft\n"
        f"stack = algebra.two({side}); algebra.two(64).bake(rank=8); algebra.theirs(64, 1)\n"
        "before = algebra.high_water()\n"
        + (f"stack.bake(rank={RANK})" if who == "ours" else f"algebra.theirs({side}, 1)")
        + "\nprint(algebra.high_water() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resize() -> None:
    """A rank-64 adapter of a 7-billion-parameter shape: 32 layers, 7 modules."""
    rng = np.random.default_rng(0)
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
              "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip
    tensors = {
        f"layers.{n}.{module}": (
            rng.standard_normal((64, n_in), np.float32),
            rng.standard_normal((out, 64), np.float32),
        )
        for n in range(32)
        for module, (out, n_in) in shapes.items()
    }
    stack = LoraStack([(LoadedLora.from_tensors(tensors), 1.0)])
    seconds = [once(lambda: stack.bake(rank=16)) for _ in range(3)]
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
    print(f"resize 64 to 16, 224 weights of a 7B shape: {median(seconds):.1f} s ({spread})")


def folder(adapters: int = 100) -> None:
    """All pairs of a folder of rank-16 adapters, one layer of a 7B shape at a time."""
    rng = np.random.default_rng(0)
    shapes = {"q": (4096, 4096), "v": (4096, 4096)}
    loras = [
        LoadedLora.from_tensors(
            {m: (rng.standard_normal((16, i), np.float32), rng.standard_normal((o, 16), np.float32))
             for m, (o, i) in shapes.items()}
        )
        for _ in range(adapters)
    ]  # fmt: skip
    stack = LoraStack([(lora, 1.0) for lora in loras])
    seconds = [once(lambda: compare(stack)) for _ in range(3)]
    print(
        f"compare {adapters} adapters, {adapters * (adapters - 1) // 2} pairs, q and v of one layer: "
        f"{median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), times 32 for all layers"
    )


def dense_from(side: int = 1024) -> None:
    """The thin way against an SVD of the product, as R grows."""
    rng = np.random.default_rng(0)
    print(f"thin way / dense way at {side}:")
    for part in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0):
        rank = int(part * side)
        matrix = lowrank.Matrix(rng.standard_normal((side, rank)), rng.standard_normal((rank, side)))
        seconds = []
        for limit in (2.0, 0.0):
            lowrank.DENSE_FROM = limit
            seconds.append(min(once(partial(_truncate, matrix)) for _ in range(3)))
        print(f"  R = {part:5} of it: {seconds[0]:.3f} s / {seconds[1]:.3f} s = {seconds[0] / seconds[1]:.2f}")
    lowrank.DENSE_FROM = 0.9


def _truncate(matrix: lowrank.Matrix) -> lowrank.Matrix:
    return lowrank.svd(matrix).truncated(RANK)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096])
    sides = parser.parse_args().sides
    resize()
    folder()
    dense_from()
    for side in sides:
        before, peft, after = ours(side), theirs(side, 2 if side <= 2048 else 1), ours(side)
        mine = median(before + after)
        print(
            f"bake(rank={RANK}) of two at {side}: {mine * 1e3:.2f} ms ({min(before + after) * 1e3:.2f} to "
            f"{max(before + after) * 1e3:.2f}); PEFT svd {median(peft):.1f} s, {median(peft) / mine:.0f} times"
        )
        small, large = peak("ours", side), peak("peft", side)
        print(f"  peak memory added: {small:.1f} MiB; PEFT {large:.0f} MiB, {large / max(small, 0.1):.0f} times")


if __name__ == "__main__":
    main()
