"""Mixtures by row on the CPU: a composition that was never seen against one that was, and what rows add to the base.

Run: python benchmarks/rows.py [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from statistics import median

import numpy as np
import torch
from timing import interleave, ratio
from torch import nn

from lorastack import LoadedLora, LoraStack
from lorastack.torch import Handle, attach

ROWS, ADAPTERS, RANK, LAYERS = 32, 16, 16, 8


def layers(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(hidden, hidden, bias=False) for _ in range(LAYERS)]).eval()


def attached(hidden: int, adapters: int = ADAPTERS) -> tuple[nn.Module, Handle]:
    model, rng = layers(hidden), np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors(
            {f"{n}.weight": (rng.standard_normal((RANK, hidden), np.float32) / hidden**0.5,
                             rng.standard_normal((hidden, RANK), np.float32) / 8) for n in range(LAYERS)},
            name=f"a{k}",
        )
        for k in range(adapters)
    ]  # fmt: skip
    return model, attach(model, LoraStack([(lora, 1.0) for lora in loras]))


def compositions(rows: int, adapters: int, per_row: int) -> itertools.cycle:
    """Adapter sets that change from step to step."""
    rng = np.random.default_rng(1)
    return itertools.cycle(
        [[{f"a{n}": 0.5 for n in rng.choice(adapters, per_row, replace=False)} for _ in range(rows)] for _ in range(61)]
    )


def bench(hidden: int, rows: int, adapters: int, per_row: int, rounds: int) -> None:
    model, handle = attached(hidden, adapters)
    base = layers(hidden)
    for ours, theirs in zip(model, base, strict=True):
        theirs.weight = ours.weight
    x = torch.randn(rows, 1, hidden)
    each = compositions(rows, adapters, per_row)
    plan = handle._plan(next(each), None, 1)

    def warm() -> None:
        with plan:
            model(x)

    def new() -> None:
        with handle.rows(next(each)):
            model(x)

    with torch.inference_mode():
        warm()
        seconds = interleave({"base": lambda: base(x), "warm": warm, "new": new}, rounds=rounds)
    print(
        f"{LAYERS} layers of {hidden}, {rows} rows, {adapters} adapters, {per_row} a row: base "
        f"{median(seconds['base']) * 1e3:.2f} ms; a warm step {ratio(seconds['warm'], seconds['base'])} of base; a new "
        f"composition {ratio(seconds['new'], seconds['warm'])} of a warm step"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(said.threads)
    for hidden in (512, 4096):
        for rows, adapters, per_row in ((32, 16, 1), (32, 16, 3), (8, 8, 1), (32, 64, 1)):
            bench(hidden, rows, adapters, per_row, said.rounds)


if __name__ == "__main__":
    main()
