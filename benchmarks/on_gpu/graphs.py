"""Graphs: a captured one replayed with another composition, and a compiled model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lorastack.torch import attach
from on_gpu.setting import DEVICE, REHEARSE, WAYS, loras_for, mixtures_of, model_of, say, seconds, stack_of, with_way


def compiled() -> None:
    """A compiled decode step: the kernels as one operator in its graph, against dense products there."""
    model, weights = model_of()
    rows, adapters = (4, 2) if REHEARSE else (32, 16)
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    stack = stack_of(loras_for(weights, adapters))
    row: dict[str, object] = {"part": "compiled", "rows": rows, "adapters": adapters}
    torch._dynamo.reset()
    live = torch.compile(model, backend="aot_eager" if REHEARSE else "inductor")
    base = seconds(lambda: live(ids, use_cache=False))
    for name, way in WAYS.items():
        with_way(way)
        with attach(model, stack) as handle, handle.rows(mixtures_of(rows, adapters, 1)):
            wanted = model(ids, use_cache=False).logits.float()
            torch._dynamo.reset()
            live = torch.compile(model, backend="aot_eager" if REHEARSE else "inductor")
            found = live(ids, use_cache=False).logits.float()
            error = float((found - wanted).norm() / wanted.norm())
            assert error < 2e-2, (name, error)
            row[f"{name}_over_base"] = round(seconds(lambda live=live: live(ids, use_cache=False)) / base, 3)
    say(**row)


def replayed() -> None:
    """A graph of one composition, replayed with another: more mixtures, more pages in a row, a row of the base."""
    model, weights = model_of()
    rows = 4 if REHEARSE else 32
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    others = [{} if n % 5 == 0 else one for n, one in enumerate(mixtures_of(rows, 8, 3))]
    for name, way in WAYS.items():
        with_way(way)
        with attach(model, stack_of(loras_for(weights, 8))) as handle:
            with handle.rows(others):
                expected = model(ids, use_cache=False).logits.float()
            with handle.rows([{"a0": 1.0}] * rows):
                plan = handle.current()
                call, kept = replayable(lambda: model(ids, use_cache=False).logits)
                start = time.perf_counter()
                plan.write(others)
                took = time.perf_counter() - start
                call()
                error = float((kept[0].float() - expected).norm() / expected.norm())
        assert error < 1e-2, (name, error)
        say(part="replayed with another composition", way=name, error=f"{error:.1e}", write_us=round(took * 1e6))


def replayable(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """(What computes again, its result); on a CPU there is no graph, and the call itself is made again."""
    for _ in range(2):
        kept = [call()]
    if DEVICE == "cpu":
        return lambda: kept.__setitem__(0, call()), kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call()]
    return lambda: (graph.replay(), torch.cuda.synchronize()), kept
