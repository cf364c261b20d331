"""Mixtures by row on the CPU: a composition that was never seen against one that was, and what rows add to the base.

Run: python benchmarks/rows.py [--threads N] [--rounds N] [--sweep]

With --sweep it prints a table for RESULTS.md, in which one thing varies at a time: the curves of docs/speed.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from timing import interleave, ratio
from torch import nn

from lorastack import LoadedLora, LoraStack
from lorastack.torch import Handle, attach

ROWS, ADAPTERS, RANK, LAYERS = 32, 16, 16, 8


def layers(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(hidden, hidden, bias=False) for _ in range(LAYERS)]).eval()


def attached(hidden: int, adapters: int = ADAPTERS, rank: int = RANK) -> tuple[nn.Module, Handle]:
    model, rng = layers(hidden), np.random.default_rng(0)
    loras = [
        LoadedLora.from_tensors(
            {f"{n}.weight": (rng.standard_normal((rank, hidden), np.float32) / hidden**0.5,
                             rng.standard_normal((hidden, rank), np.float32) / 8) for n in range(LAYERS)},
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


def in_peft(hidden: int, adapters: int, rank: int) -> nn.Module:
    """The same layers and as many adapters of that rank in PEFT."""
    config = LoraConfig(r=rank, target_modules=[str(n) for n in range(LAYERS)], init_lora_weights=False)
    model = get_peft_model(layers(hidden), config, "a0")
    for n in range(1, adapters):
        model.add_adapter(f"a{n}", config)
    return model.eval()


def measured(
    hidden: int, rows: int, adapters: int, per_row: int, rank: int, rounds: int,
    peft: bool = False, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of a pass of the base, of a warm step, of a new composition, and of PEFT's ``adapter_names``."""
    model, handle = attached(hidden, adapters, rank)
    base = layers(hidden)
    for ours, theirs in zip(model, base, strict=True):
        theirs.weight = ours.weight
    x = torch.randn(rows, 1, hidden)
    each = compositions(rows, adapters, per_row)
    first = next(each)
    plan = handle._plan(first, None, 1)

    def warm() -> None:
        with plan:
            model(x)

    def new() -> None:
        with handle.rows(next(each)):
            model(x)

    contenders = {"base": lambda: base(x), "warm": warm, "new": new}
    if peft and per_row == 1:  # it has one adapter for a row
        other, names = in_peft(hidden, adapters, rank), [name for row in first for name in row]
        contenders["peft"] = lambda: other(x, adapter_names=names)
    with torch.inference_mode():
        warm()
        return interleave(contenders, rounds=rounds, clock=clock)


def bench(hidden: int, rows: int, adapters: int, per_row: int, rounds: int) -> None:
    seconds = measured(hidden, rows, adapters, per_row, RANK, rounds)
    print(
        f"{LAYERS} layers of {hidden}, {rows} rows, {adapters} adapters, {per_row} a row: base "
        f"{median(seconds['base']) * 1e3:.2f} ms; a warm step {ratio(seconds['warm'], seconds['base'])} of base; a new "
        f"composition {ratio(seconds['new'], seconds['warm'])} of a warm step"
    )


#: What is varied, from a point in the middle.
MIDDLE = {"hidden": 1024, "rank": RANK, "adapters": ADAPTERS, "rows": ROWS, "per_row": 1}
SWEEP = {
    "hidden": (128, 256, 512, 1024, 2048, 4096), "rank": (4, 8, 16, 32, 64, 128), "adapters": (1, 2, 4, 16, 64),
    "rows": (1, 2, 8, 32, 128), "per_row": (1, 2, 4, 8),
}  # fmt: skip


def sweep(rounds: int) -> None:
    """One table, a line for each point of a curve: processor time, of the base's. For one thread."""
    print("| | a warm step | a new composition | PEFT `adapter_names` |\n|---|---|---|---|")
    for name, values in SWEEP.items():
        for value in values:
            seconds = measured(**MIDDLE | {name: value}, rounds=rounds, peft=True, clock=time.thread_time)
            cells = [ratio(seconds[one], seconds["base"]) if one in seconds else "-" for one in ("warm", "new", "peft")]
            print(f"| {name.replace('per_row', 'adapters a row')} {value} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sweep", action="store_true")
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(said.threads)
    if said.sweep:
        sweep(said.rounds)
        return
    for hidden in (512, 4096):
        for rows, adapters, per_row in ((32, 16, 1), (32, 16, 3), (8, 8, 1), (32, 64, 1)):
            bench(hidden, rows, adapters, per_row, said.rounds)


if __name__ == "__main__":
    main()
