"""Interleaved timing: every contender in turn, many rounds, medians of ratios with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int = 40,
    budget: float = 0.005,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one list entry per round.

    Each round runs every contender for about ``budget`` seconds; the machine's drift then meets all alike. Of one
    thread, ``clock=time.thread_time`` leaves out the time that other work had the processor.
    """
    loops = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        loops[name] = max(1, int(budget / max(time.perf_counter() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            for _ in range(loops[name]):
                call()
            seconds[name].append((clock() - start) / loops[name])
    return seconds


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(a: list[float], b: list[float]) -> str:
    """Median of a/b round by round, with its quartiles."""
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    quarter = len(ratios) // 4
    return f"{median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-quarter - 1]:.2f})"


def show(title: str, seconds: dict[str, list[float]], against: str) -> None:
    """Print each contender's median time and its ratio to ``against``."""
    print(title)
    for name, values in seconds.items():
        print(f"  {name:42} {median(values) * 1e6:10.1f} us   x {ratio(values, seconds[against])}")
