"""Who calls a model on a user's behalf under `rows`: pipelines, streamers in threads of their own, event loops."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from lorastack import LoraStack, load
from lorastack.errors import ArgumentError, ShapeError
from lorastack.torch import Handle, attach
from lorastack.torch.generate import load_base

NEW = 12
PROMPT = "Once upon a time there was a little"
MIXTURES = [{"luna": 1.0}, {"robot": 1.0}, {"luna": 0.5, "robot": 0.5}, {}]


@pytest.fixture(scope="module")
def demo_model(demo: Path) -> tuple[Any, Any, list[LoraStack]]:
    model, tokenizer = load_base(str(demo / "base"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer, [load(demo / name) for name in ("luna", "robot")]


@pytest.fixture
def live(demo_model: Any) -> Any:
    model, tokenizer, adapters = demo_model
    with attach(model, LoraStack([(lora, 1.0) for lora in adapters])) as handle:
        yield model, tokenizer, handle


def text(live: Any, new: int = NEW) -> str:
    """The continuation, in whatever context this is called in."""
    model, tokenizer, _ = live
    with torch.no_grad():
        made = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(made[0], skip_special_tokens=True)


@pytest.fixture
def expected(live: Any) -> list[str]:
    """The text of each mixture by itself: from a model whose stack has these scales, without any rows."""
    found = []
    for mixture in MIXTURES:
        live[2].set_scales({name: mixture.get(name, 0.0) for name in ("luna", "robot")})
        found.append(text(live))
    live[2].set_scales({"luna": 1.0, "robot": 1.0})
    assert len(set(found)) == len(MIXTURES)
    return found


def test_a_pipeline_has_the_rows(live: Any, expected: list[str]) -> None:
    model, tokenizer, handle = live
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": NEW, "do_sample": False}
    for mixture, wanted in zip(MIXTURES, expected, strict=True):
        with handle.rows([mixture]):
            assert pipe(PROMPT, **options)[0]["generated_text"] == wanted
    with handle.rows(MIXTURES):
        found = pipe([PROMPT] * 4, batch_size=4, **options)
    assert [several[0]["generated_text"] for several in found] == expected
    with handle.rows(MIXTURES[:1]):
        found = pipe(PROMPT, num_return_sequences=3, num_beams=3, **options)
        one = pipe(PROMPT, num_beams=3, **options)
    assert found[0] == one[0], "beams and returned sequences follow their row"
    with handle.rows(MIXTURES), pytest.raises(ShapeError, match="the batch has 1 rows, there are 4 mixtures"):
        pipe([PROMPT] * 4, **options)  # one by one: which row would each be?


def test_streamers_in_threads_of_their_own(live: Any, expected: list[str]) -> None:
    model, tokenizer, handle = live

    def stream(run: Callable[..., Any]) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        options = {**inputs, "streamer": streamer, "max_new_tokens": NEW, "do_sample": False}
        thread = threading.Thread(target=run, args=(model.generate,), kwargs=options)
        thread.start()
        said = "".join(streamer)
        thread.join()
        return said

    def request(n: int) -> str:
        with handle.rows([MIXTURES[n]]):
            if n % 2:
                return stream(contextvars.copy_context().run)
            plan = handle.current()

            def planned(generate: Callable[..., Any], **options: Any) -> None:
                with plan:
                    generate(**options)

            return stream(planned)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(request, [0, 1, 2, 3] * 2)) == expected * 2


def test_event_loops_generate_in_executors(live: Any, expected: list[str]) -> None:
    handle: Handle = live[2]

    async def request(n: int) -> str:
        with handle.rows([MIXTURES[n]]):
            await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            if n == 0:
                with pytest.raises(ArgumentError, match="this context has no rows, while another has"):
                    await loop.run_in_executor(None, text, live)
            if n % 2:
                return await asyncio.to_thread(text, live)
            return await loop.run_in_executor(None, contextvars.copy_context().run, text, live)

    async def main() -> list[str]:
        return list(await asyncio.gather(*(request(n) for n in range(4))))

    assert asyncio.run(main()) == expected
