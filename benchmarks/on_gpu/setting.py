"""Setting: the device, how a call is timed there, models, adapters and mixtures that are measured."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median

REHEARSE = "--rehearse" in sys.argv
if REHEARSE:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lorastack import LoadedLora, LoraStack  # noqa: E402
from lorastack.torch.ways import Way, choice  # noqa: E402
from lorastack.torch.ways.dense import DENSE  # noqa: E402
from lorastack.torch.ways.pages import PAGES  # noqa: E402

DEVICE = "cpu" if REHEARSE else "cuda"
DTYPE = torch.float32 if REHEARSE else torch.bfloat16
RANK = 16
WAYS: dict[str, Way] = {"pages": PAGES, "dense": DENSE}
#: What is asked of `rows()`: None has the way that was set for every layer.
ASKED: dict[str, tuple[Way, str | None]] = {"pages": (PAGES, None), "dense": (DENSE, None), "fast": (PAGES, "fast")}
FOUND: list[dict] = []


def say(**row: object) -> None:
    FOUND.append(row)
    print(json.dumps(row), flush=True)


def seconds(call: Callable[[], object], captured: bool = True, rounds: int = 30) -> float:
    """Median of one call, replayed from a CUDA graph where that is said."""
    for _ in range(2):
        call()
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    if captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def bandwidth() -> float:
    """Bytes a second of a copy of half a GiB."""
    a = torch.empty(2**16 if REHEARSE else 2**28, dtype=torch.bfloat16, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 2 / seconds(lambda: b.copy_(a))


def loras_for(weights: dict[str, tuple[int, int]], count: int) -> list[LoadedLora]:
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        factors = {
            name: (
                rng.standard_normal((RANK, n_in), np.float32) / n_in**0.5,
                rng.standard_normal((n_out, RANK), np.float32) / 8,
            )
            for name, (n_out, n_in) in weights.items()
        }
        made.append(LoadedLora.from_tensors(factors, name=f"a{n}", naming="hf"))
    return made


def stack_of(loras: list[LoadedLora]) -> LoraStack:
    return LoraStack([(lora, 1.0) for lora in loras])


def with_way(way: Way) -> None:
    """Every layer computes its rows so."""
    choice.own = lambda layer: way


def mixtures_of(rows: int, adapters: int, per: int, shift: int = 0) -> list[dict[str, float]]:
    return [{f"a{(i * 7 + j * 13 + shift) % adapters}": 0.3 + 0.1 * j for j in range(per)} for i in range(rows)]


def model_of() -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_key_value_heads": 2,
    }
    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    }
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**(small if REHEARSE else large))).to(DTYPE).eval()
    weights = {
        f"{path}.weight": tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("model.layers")
    }
    return model, weights
