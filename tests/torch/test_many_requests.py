"""Eight threads, mixtures of their own, generated text: the real small model and its adapters."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

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
TEXTS = 400
PROMPT = "Once upon a time, a boy had a ball. He went to the"


@pytest.mark.slow
def test_four_hundred_texts_of_eight_threads_are_each_requests_own(shared: Path) -> None:
    folder = shared / "stories260k"
    model, tokenizer = load_base(str(folder / "base"))
    names = ("zara", "excited", "robot-garden")
    handle = attach(model, LoraStack([(load(folder / "adapters" / name), 1.0) for name in names]))
    compiled: Any = torch.compile(model, backend="eager")

    def texts(mixtures: list[dict[str, float]], live: Any, new: int) -> list[str]:
        inputs = tokenizer([PROMPT] * len(mixtures), return_tensors="pt")
        with handle.rows(mixtures), torch.no_grad():
            if live is model:
                tokens = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
            else:  # token by token through the compiled forward pass
                tokens = inputs["input_ids"]
                for _ in range(new):
                    step = live(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    tokens = torch.cat([tokens, step], 1)
        return tokenizer.batch_decode(tokens)

    expected = [texts(mixtures, model, 20) for mixtures in MIXTURES]
    assert len({text for several in expected for text in several}) > 3
    torch._dynamo.config.recompile_limit = 64

    def request(n: int) -> bool:
        kind = n % len(MIXTURES)
        return texts(MIXTURES[kind], compiled if n % 4 == 0 else model, 20) == expected[kind]

    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(8) as pool:
            right = list(pool.map(request, range(TEXTS)))
    finally:
        sys.setswitchinterval(5e-3)
        torch._dynamo.reset()
    assert right.count(False) == 0
    assert sum(n % 4 == 0 for n in range(TEXTS)) == 100
