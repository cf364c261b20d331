"""Weight: what each way adds to the product of one weight, checked against float64 before it is timed."""

from __future__ import annotations

import torch
from torch import nn

from lorastack import LoadedLora
from lorastack.torch import attach
from on_gpu.setting import (
    ASKED,
    DEVICE,
    DTYPE,
    RANK,
    REHEARSE,
    loras_for,
    mixtures_of,
    say,
    seconds,
    stack_of,
    with_way,
)


def one_weight(copy: float) -> None:
    """One square weight: added time of each way, beside the base's product and the bytes of factors that are used."""
    hidden, many = (64, 2) if REHEARSE else (4096, 24)
    cases = [
        (1, 1, 1),
        (8, 8, 1),
        (32, 16, 1),
        (32, 32, 1),
        (32, 64, 3),
        (128, 64, 1),
        (256, 64, 1),
        (256, 64, 3),
        (2048, 4, 1),
    ]
    for tokens, adapters, per in cases[:3] if REHEARSE else cases:
        rows = min(tokens, 256)
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(hidden, hidden, bias=False) for _ in range(many)]).to(DEVICE, DTYPE).eval()
        loras = loras_for({f"{n}.weight": (hidden, hidden) for n in range(many)}, adapters)
        x = torch.randn(rows, tokens // rows, hidden, device=DEVICE, dtype=DTYPE)
        mixtures = mixtures_of(rows, adapters, per)
        base = seconds(lambda m=model, x=x: [layer(x) for layer in m]) / many
        used = len({name for one in mixtures for name in one})
        row = {
            "part": "one weight",
            "tokens": tokens,
            "adapters": adapters,
            "per_row": per,
            "base_us": round(base * 1e6, 2),
            "floor_us": round((used * RANK * 2 * hidden * 2 + tokens * hidden * 6) / copy * 1e6, 2),
        }
        for name, (way, asked) in ASKED.items():
            with_way(way)
            stack = stack_of(loras)
            with attach(model, stack) as handle, handle.rows(mixtures, way=asked):
                error = error_of(model[0], loras, "0.weight", x, mixtures)
                run = seconds(lambda m=model, x=x: [layer(x) for layer in m]) / many
            row |= {f"{name}_us": round((run - base) * 1e6, 2), f"{name}_error": f"{error:.1e}"}
            assert error < 2e-2, (name, error)
        say(**row)


def error_of(layer: nn.Module, loras: list[LoadedLora], name: str, x: torch.Tensor, mixtures: list) -> float:
    """Of the first rows' sums in float64, relative to what the adapters add."""
    found, weight = layer(x).double(), layer.weight.double()
    worst = 0.0
    for n in range(0, len(mixtures), max(len(mixtures) // 8, 1)):
        delta = (
            sum(
                (
                    s * torch.from_numpy(next(lora for lora in loras if lora.name == own).adapters[name].dense())
                    for own, s in mixtures[n].items()
                ),
                torch.zeros(1),
            )
            .to(DEVICE)
            .double()
        )
        base, added = x[n].double() @ weight.T, x[n].double() @ delta.T
        worst = max(worst, float((found[n] - base - added).norm() / (base + added).norm()))
    return worst
