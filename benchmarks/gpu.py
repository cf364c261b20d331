"""Mixtures by row on a GPU: each way to compute one weight, and steps of a model, against base, PEFT and bytes.

Run: python benchmarks/gpu.py [--out FOLDER] [--only PART]. Needs CUDA and Triton. ``--rehearse`` runs every part on a
CPU at small sizes, in Triton's interpreter: its figures say nothing. Every case of one weight is checked against
float64 before it is timed, and every other against a way that was.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from on_gpu.graphs import compiled, replayed
from on_gpu.less import one_thing_less
from on_gpu.setting import FOUND, REHEARSE, bandwidth, say
from on_gpu.steps import against_peft, steps
from on_gpu.weight import one_weight

PARTS: dict[str, Callable[[float], None]] = {
    "weight": one_weight,
    "steps": lambda copy: steps(),
    "less": lambda copy: one_thing_less(),
    "replayed": lambda copy: replayed(),
    "compiled": lambda copy: compiled(),
    "peft": lambda copy: against_peft(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    said = parser.parse_args()
    if not REHEARSE and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --rehearse runs the parts on a CPU, for their errors only")
    warnings.simplefilter("ignore")
    with torch.no_grad():  # inference tensors do not tell whether they were changed, so that layers share nothing
        copy = bandwidth()
        name = "rehearsal on a CPU" if REHEARSE else torch.cuda.get_device_name()
        say(part="device", name=name, torch=torch.__version__, copy_tb_s=round(copy * 1e-12, 2))
        for part, run in PARTS.items():
            if said.only in (None, part):
                run(copy)
    if said.out:
        (said.out / "gpu.json").write_text(json.dumps(FOUND, indent=1))


if __name__ == "__main__":
    main()
