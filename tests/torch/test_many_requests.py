"""Eight threads, mixtures of their own, text that `generate` makes: the real small model and its adapters."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from lorastack import LoraStack, load
from lorastack.torch import attach
from lorastack.torch.generate import load_base

MIXTURES: list[list[dict[str, float]]] = [
    [{"zara": 1.0}],
    [{"excited": 1.0}],
    [{"robot-garden": 1.0}, {}],
    [{"zara": 0.7, "excited": 0.3}],
    [{}],
    [{"zara": 1.0}, {"excited": 1.0}, {"robot-garden": 0.5, "excited": 1.0}],
]
TEXTS, THREADS, NEW = 400, 8, 20
PROMPT = "Once upon a time, a boy had a ball. He went to the"


class Counting:
    """A backend that compiles to what it was given, and counts the graphs and each thread's runs of them."""

    def __init__(self) -> None:
        self.graphs, self.runs = 0, Counter[int]()

    def __deepcopy__(self, memo: Any) -> Counting:
        return self  # which a CompileConfig makes of its fields

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs[threading.get_ident()] += 1
            return graph.forward(*args)

        return run

    def options(self) -> dict[str, Any]:
        """For `generate`: a static cache has it compile its steps, on other devices than this one when asked only."""
        config = CompileConfig(backend=self, mode=None)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}


def raise_limits() -> None:
    """Each mixture is a graph of its own, of which a function may have eight; it is each thread's own setting."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256


@pytest.mark.slow
def test_four_hundred_texts_of_eight_threads_are_each_requests_own(shared: Path) -> None:
    folder = shared / "stories260k"
    model, tokenizer = load_base(str(folder / "base"))
    names = ("zara", "excited", "robot-garden")
    handle = attach(model, LoraStack([(load(folder / "adapters" / name), 1.0) for name in names]))
    backend = Counting()

    def texts(mixtures: list[dict[str, float]], compiled: bool) -> list[str]:
        inputs = tokenizer([PROMPT] * len(mixtures), return_tensors="pt")
        options = backend.options() if compiled else {}
        with handle.rows(mixtures), torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)
        return tokenizer.batch_decode(made)

    expected = [texts(mixtures, False) for mixtures in MIXTURES]
    assert len({text for several in expected for text in several}) > 3

    def request(n: int) -> tuple[bool, bool, int]:
        """Whether the texts are right, whether they were to be compiled, and how many compiled passes there were."""
        kind, compiled = n // 4 % len(MIXTURES), n % 4 == 0
        before = backend.runs[threading.get_ident()]
        right = texts(MIXTURES[kind], compiled) == expected[kind]
        return right, compiled, backend.runs[threading.get_ident()] - before

    torch._dynamo.reset()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(THREADS, initializer=raise_limits) as pool:  # nothing is compiled yet
            first = list(pool.map(request, range(TEXTS // 4)))
            graphs = backend.graphs
            rest = list(pool.map(request, range(TEXTS // 4, TEXTS)))
    finally:
        sys.setswitchinterval(5e-3)
        torch._dynamo.reset()
    wrong = [n for n, (right, *_) in enumerate(first + rest) if not right]
    assert wrong == []
    assert sum(runs for _, compiled, runs in first + rest if not compiled) == 0
    # The first token comes from the prompt's own pass, which `generate` does not compile. And one was seen to run as
    # it is while another thread compiled, which torch makes an error of under fullgraph.
    runs = [runs for _, compiled, runs in first + rest if compiled]
    assert len(runs) == TEXTS // 4
    assert set(runs) <= {NEW - 2, NEW - 1}
    assert sum(runs) > 0.99 * len(runs) * (NEW - 1)
    # Threads that want the same graph at the same time may make it twice, and never once it is there.
    assert len(MIXTURES) <= graphs <= len(MIXTURES) * THREADS
    assert backend.graphs == graphs
