"""Mixtures on the real vLLM: the first request of a new one against a repeated one, and many in one batch.

Run: LORASTACK_FLEET_VENV=... python benchmarks/fleet.py [ROUNDS]   (after `make fleet-venv`, which says the default)

Every contender is asked of the same running server, in turn, and rounds are repeated: the machine's drift meets all
alike. The batch compares 32 requests that name 1, 8 and 32 mixtures with 32 that name the base.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.conftest import DEMO
from tests.fleet.engine import Server, serving
from tests.fleet.padded import pad_adapter, pad_base

PROMPT = "Once upon a time there was a little"
REQUESTS, TOKENS = 32, 64


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        base = pad_base(DEMO / "base", place / "base")
        library = place / "library"
        library.mkdir()
        for name in ("luna", "robot"):
            pad_adapter(DEMO / name, library / name)
        words = ("--max-loras", "32", "--max-cpu-loras", "256", "--max-num-seqs", "32")
        with serving(base, library, place, *words, max_mixtures="100000") as server:
            latency(server, rounds * 4)
            throughput(server, rounds)


def latency(server: Server, rounds: int) -> None:
    """Milliseconds of a request for one token."""
    numbers = count(1)
    seconds: dict[str, list[float]] = {"the base": [], "a mixture again": [], "a new mixture": []}
    server.complete("luna+robot", PROMPT, 1)
    for _ in range(rounds):
        models = (str(server.base), "luna+robot", f"luna:0.{next(numbers):04d}+robot:0.5")
        for name, model in zip(seconds, models, strict=True):
            begun = time.perf_counter()
            status, answer = server.complete(model, PROMPT, 1)
            seconds[name].append(time.perf_counter() - begun)
            assert status == 200, answer
    print(f"one request for one token, {rounds} rounds")
    for name, values in seconds.items():
        ordered = sorted(values)
        quarter = len(ordered) // 4
        low, high = ordered[quarter] * 1e3, ordered[-quarter - 1] * 1e3
        print(f"  {name:16} {median(values) * 1e3:7.1f} ms ({low:.1f} to {high:.1f})")


def throughput(server: Server, rounds: int) -> None:
    """Tokens a second of a batch."""
    kinds = {"no adapter": [str(server.base)]}
    kinds |= {f"{n} mixtures": [f"luna:0.{k + 1:02d}+robot:0.5" for k in range(n)] for n in (1, 8, REQUESTS)}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with ThreadPoolExecutor(REQUESTS) as pool:

        def batch(models: list[str]) -> float:
            asked = [models[n % len(models)] for n in range(REQUESTS)]
            said = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            begun = time.perf_counter()
            found = list(pool.map(lambda model: server.post("/v1/completions", {"model": model, **said}), asked))
            took = time.perf_counter() - begun
            assert all(status == 200 for status, _ in found), found
            return sum(answer["usage"]["completion_tokens"] for _, answer in found) / took

        for models in kinds.values():  # baked and loaded
            batch(models)
        for _ in range(rounds):
            for name, models in kinds.items():
                rates[name].append(batch(models))
    print(f"{REQUESTS} requests at once for {TOKENS} tokens each, {rounds} rounds")
    for name, values in rates.items():
        parts = [value / bare for value, bare in zip(values, rates["no adapter"], strict=True)]
        print(f"  {name:16} {median(values):7.0f} tokens/s   x {median(parts):.2f} of no adapter")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
