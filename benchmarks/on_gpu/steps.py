"""Steps: decode steps and prefills of a model by each way, new compositions, and what PEFT adds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorastack.torch import Handle, attach
from lorastack.torch.ways.pages import PAGES
from on_gpu.setting import (
    ASKED,
    DEVICE,
    RANK,
    REHEARSE,
    loras_for,
    mixtures_of,
    model_of,
    say,
    seconds,
    stack_of,
    with_way,
)


def steps() -> None:
    """A decode step and a prefill of four 8B-shaped layers; a composition that was never seen; PEFT."""
    model, weights = model_of()
    for rows, length, adapters, per in [
        (1, 1, 1, 1),
        (8, 1, 8, 1),
        (32, 1, 16, 1),
        (32, 1, 16, 3),
        (128, 1, 64, 1),
        (4, 512, 4, 1),
    ][: 2 if REHEARSE else None]:
        ids = torch.randint(3, 64, (rows, length), device=DEVICE)

        def call(ids: torch.Tensor = ids) -> object:
            return model(ids, use_cache=False).logits

        base, eager = seconds(call), seconds(call, captured=False)
        loras = loras_for(weights, adapters)
        row = {
            "part": "step",
            "rows": rows,
            "tokens": length,
            "adapters": adapters,
            "per_row": per,
            "base_ms": round(base * 1e3, 4),
        }
        for name, (way, asked) in ASKED.items():
            with_way(way)
            with attach(model, stack_of(loras)) as handle:
                row |= {
                    f"{name}_{key}": value
                    for key, value in rows_figures(handle, call, base, eager, rows, adapters, per, asked).items()
                }
        say(**row)


def rows_figures(
    handle: Handle, call: Callable, base: float, eager: float, rows: int, adapters: int, per: int, asked: str | None
) -> dict[str, float]:
    shift = 0

    def new() -> object:
        nonlocal shift
        shift += 1
        with handle.rows(mixtures_of(rows, adapters, per, shift), way=asked):
            return call()

    with handle.rows(mixtures_of(rows, adapters, per), way=asked):
        captured, warm = seconds(call), seconds(call, captured=False)
    first = seconds(new, captured=False)
    return {
        "over_base": round(captured / base, 3),
        "eager_over_base": round(warm / eager, 3),
        "new_over_warm": round(first / warm, 3),
    }


def against_peft() -> None:
    """What rows add to a decode step, of what PEFT's ``adapter_names`` add."""
    from peft import LoraConfig, get_peft_model

    rows, adapters = (4, 2) if REHEARSE else (32, 16)
    model, weights = model_of()
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    base = seconds(lambda: model(ids, use_cache=False), captured=False)
    with_way(PAGES)
    mixtures = [{f"a{n % adapters}": 1.0} for n in range(rows)]
    with attach(model, stack_of(loras_for(weights, adapters))) as handle:  # noqa: SIM117
        with handle.rows(mixtures):
            ours = seconds(lambda: model(ids, use_cache=False), captured=False)
    targets = sorted({name.split(".")[-2] for name in weights})
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="a0")
    for n in range(1, adapters):
        peft.add_adapter(f"a{n}", config)
    names = [next(iter(one)) for one in mixtures]
    theirs = seconds(lambda: peft.eval()(input_ids=ids, adapter_names=names, use_cache=False), captured=False, rounds=5)
    say(
        part="peft",
        rows=rows,
        adapters=adapters,
        ours_over_base=round(ours / base, 3),
        peft_over_base=round(theirs / base, 3),
        of_what_peft_adds=round((ours - base) / (theirs - base), 3),
    )
