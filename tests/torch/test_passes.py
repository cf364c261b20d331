"""The contract of rows: a pass has one plan, fixed where it begins, whatever other threads, tasks and compilers do."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lorastack import LoadedLora, LoraStack
from lorastack.errors import ArgumentError, LoraStackWarning, ShapeError
from lorastack.torch import Handle, attach
from tests.torch.families import adapter_for, linear_weights, made
from tests.torch.tiny import far, tokens

NAMES = ("a", "b", "c")
MIXTURES = [{"a": 1.0}, {"b": 0.7, "c": 0.3}, {}, {"c": -0.5}]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraStackWarning)
        yield


def adapters(model: nn.Module, endings: tuple[str, ...] = ("q_proj", "v_proj")) -> list[LoadedLora]:
    weights = {name: shape for ending in endings for name, shape in linear_weights(model, ending).items()}
    return [adapter_for(weights, seed=n).renamed(name) for n, name in enumerate(NAMES)]


def attached(family: str = "qwen2") -> tuple[Any, Handle]:
    model = made(family)
    return model, attach(model, LoraStack([(lora, 1.0) for lora in adapters(model)]))


def logits(model: Any, rows: int = 1) -> torch.Tensor:
    with torch.no_grad():  # which a thread has to say for itself
        return model(input_ids=tokens(rows, 6)).logits


def alone(model: Any, handle: Handle, mixture: dict[str, float]) -> torch.Tensor:
    with handle.rows([mixture]):
        return logits(model)


# ---- threads and tasks


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_have_their_own_rows(compiled: bool) -> None:
    model, handle = attached()
    live = torch.compile(model, backend="eager") if compiled else model
    expected = [alone(model, handle, mixture) for mixture in MIXTURES]
    assert far(expected[0], expected[1]) > 1e-3
    sys.setswitchinterval(1e-5)

    def passes(n: int) -> int:
        with handle.rows([MIXTURES[n % 4]]):
            return sum(far(logits(live), expected[n % 4]) > 1e-5 for _ in range(10))

    try:
        with ThreadPoolExecutor(8) as pool:
            wrong = list(pool.map(passes, range(16)))
    finally:
        sys.setswitchinterval(5e-3)
    assert wrong == [0] * 16
    handle.detach()


def test_two_requests_that_leave_in_any_order_leave_the_stack() -> None:
    model, handle = attached()
    plain, expected = logits(model), {name: alone(model, handle, {name: 1.0}) for name in "ab"}
    steps = [threading.Event() for _ in range(3)]
    found = {}

    def first() -> None:
        with handle.rows([{"a": 1.0}]):
            steps[0].set()
            steps[1].wait(10)
            found["a"] = logits(model)
        steps[2].set()

    def second() -> None:
        steps[0].wait(10)
        with handle.rows([{"b": 1.0}]):
            steps[1].set()
            steps[2].wait(10)
            found["b"] = logits(model)

    threads = [threading.Thread(target=one) for one in (first, second)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert all(torch.equal(found[name], expected[name]) for name in "ab")
    assert torch.equal(logits(model), plain)


def test_asyncio_tasks_have_their_own_rows_also_when_generators_are_closed_elsewhere() -> None:
    model, handle = attached()
    expected = [alone(model, handle, mixture) for mixture in MIXTURES]
    plain = logits(model)

    async def request(n: int) -> bool:
        with handle.rows([MIXTURES[n]]):
            wrong = 0
            for _ in range(5):
                await asyncio.sleep(0)
                wrong += not torch.equal(logits(model), expected[n])
            return wrong == 0

    async def streamed() -> Any:
        with handle.rows([{"a": 1.0}]):
            for _ in range(3):
                yield logits(model)

    async def main() -> list[bool]:
        stream = streamed()
        first = await asyncio.create_task(stream.__anext__())  # in a context of its own
        assert torch.equal(first, expected[0])
        await stream.aclose()  # in another one
        return list(await asyncio.gather(*(request(n) for n in range(4))))

    assert asyncio.run(main()) == [True] * 4
    assert torch.equal(logits(model), plain)


def test_a_thread_without_rows_is_told_its_ways_and_each_of_them_works() -> None:
    model, handle = attached()
    plain, expected = logits(model), alone(model, handle, {"a": 1.0})

    def with_plan(plan: Any) -> torch.Tensor:
        with plan:
            return logits(model)

    with ThreadPoolExecutor(1) as pool, handle.rows([{"a": 1.0}]):
        with pytest.raises(ArgumentError, match=r"no rows, while another has.*handle\.current\(\).*handle\.plain\(\)"):
            pool.submit(logits, model).result()
        assert torch.equal(pool.submit(with_plan, handle.current()).result(), expected)
        assert torch.equal(pool.submit(contextvars.copy_context().run, logits, model).result(), expected)
        assert torch.equal(pool.submit(with_plan, handle.plain()).result(), plain)
        assert torch.equal(logits(model), expected)
    assert torch.equal(pool_free(model), plain)


def pool_free(model: Any) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(logits, model).result()


def test_run_in_executor_and_to_thread() -> None:
    model, handle = attached()
    expected = alone(model, handle, {"a": 1.0})

    async def main() -> None:
        with handle.rows([{"a": 1.0}]):
            assert torch.equal(await asyncio.to_thread(logits, model), expected)  # which takes the context along
            loop = asyncio.get_running_loop()
            with pytest.raises(ArgumentError, match="no rows, while another has"):
                await loop.run_in_executor(None, logits, model)
            context = contextvars.copy_context()
            assert torch.equal(await loop.run_in_executor(None, context.run, logits, model), expected)

    asyncio.run(main())


def test_a_streamers_thread_inside_rows() -> None:
    model, handle = attached()
    ids = tokens(1, 6)

    def generate(plan: Any = None) -> Any:
        with plan or handle.plain():
            return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    with handle.rows([{"b": 1.0}]):
        expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(generate, handle.current()).result(), expected)


def test_two_generations_of_two_hundred_tokens_interleave() -> None:
    model, handle = attached()
    order: list[str] = []
    model.register_forward_pre_hook(lambda *_: order.append(threading.current_thread().name))
    new = 200
    assert model.config.max_position_embeddings > new + 4

    def generate(name: str) -> Any:
        with handle.rows([{name: 1.0}]), torch.no_grad():
            barrier.wait(10)
            return model.generate(
                input_ids=tokens(1, 4), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )

    barrier = threading.Barrier(1)
    expected = {name: generate(name) for name in "ab"}
    assert not torch.equal(expected["a"], expected["b"])
    assert order == [threading.current_thread().name] * 2 * new
    order.clear()
    barrier = threading.Barrier(2)
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda n=name: found.__setitem__(n, generate(n)), name=name) for name in "ab"]
    for one in threads:  # which give way to each other as often as Python has them do by itself
        one.start()
    for one in threads:
        one.join()
    assert all(torch.equal(found[name], expected[name]) for name in "ab")
    assert sorted(order) == ["a"] * new + ["b"] * new
    turns = [len(list(passes)) for _, passes in itertools.groupby(order)]
    assert len(turns) > 40, f"passes in turn: {turns}"
    # The last turn is what one of them has left once the other is done: they need not be equally fast.
    assert max(turns[:-1]) < new / 2, f"passes in turn: {turns}"


# ---- what a batch is


def test_the_batch_is_held_against_the_rows() -> None:
    model, handle = attached()
    with handle.rows(MIXTURES[:2]):
        for rows in (1, 3, 4, 6):
            with pytest.raises(ShapeError, match=f"the batch has {rows} rows, there are 2 mixtures"):
                logits(model, rows)
        logits(model, 2)
    with handle.rows(MIXTURES[:2], copies=3):
        six = logits(model, 6)
        with pytest.raises(ShapeError, match="2 mixtures of 3 copies"):
            logits(model, 2)
    for n in range(6):
        with handle.rows([MIXTURES[n // 3]]), torch.no_grad():
            assert far(six[n : n + 1], model(input_ids=tokens(6, 6)[n : n + 1]).logits) < 1e-5


def test_a_layer_that_gets_another_batch_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x.transpose(0, 1))

    model = Mixed()
    with (
        attach(model, adapter_for({"one.weight": (8, 8)})) as handle,
        handle.rows([{"made": 1.0}] * 2),
        pytest.raises(ShapeError, match=r"one.weight got \[4, 2, 8\], in a pass of 2 rows; its rows cannot be told"),
    ):
        model(torch.randn(2, 4, 8))


def test_rows_follow_logits_to_keep() -> None:
    model = made("qwen2")
    lora = adapter_for({**linear_weights(model, "q_proj"), "lm_head.weight": (64, 32)})
    mixtures = [{"made": 1.0}, {}, {"made": -0.5}]
    with attach(model, lora) as handle, handle.rows(mixtures):
        whole = model(input_ids=tokens(3, 8)).logits
        assert far(whole[0], whole[1]) > 1e-3
        for keep in (1, 5, torch.tensor([0, 6])):
            part = model(input_ids=tokens(3, 8), logits_to_keep=keep).logits
            assert far(part, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]) < 1e-5


def test_packed_rows_follow_logits_to_keep() -> None:
    model = made("qwen2")
    lora = adapter_for({**linear_weights(model, "q_proj"), "lm_head.weight": (64, 32)})
    ids, ends = tokens(1, 10), [0, 4, 10]
    index = torch.tensor([0] * 4 + [1] * 6)
    with attach(model, lora) as handle:
        with handle.rows([{"made": 1.0}, {}], cu_seqlens=ends):
            whole = model(input_ids=ids).logits
            for keep in (1, 7, torch.tensor([2, 3, 4, 9])):
                part = model(input_ids=ids, logits_to_keep=keep).logits
                picked = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
                assert far(part, picked) < 1e-5
        with handle.rows([{"made": 1.0}, {}], index=index):
            assert torch.equal(model(input_ids=ids).logits, whole)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_generate_calls_the_encoder_alone(family: str) -> None:
    model = made(family)
    endings = ("q", "v") if family == "t5" else ("q_proj", "v_proj")
    handle = attach(model, LoraStack([(lora, 1.0) for lora in adapters(model, endings)]))
    torch.manual_seed(0)
    given: dict[str, Any] = {"input_ids": tokens(3, 6)} if family == "t5" else {
        "input_features": torch.randn(3, 80, 40)}  # fmt: skip
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    with handle.rows(MIXTURES[:3]):
        found = model.generate(**given, **options)
    for n in range(3):
        with handle.rows([MIXTURES[n]]):
            single = model.generate(**{key: value[n : n + 1] for key, value in given.items()}, **options)
        length = min(single.shape[1], found.shape[1])
        assert torch.equal(found[n : n + 1, :length], single[:, :length])


def test_data_parallel_and_a_block_called_alone_have_the_rows() -> None:
    model, handle = attached()
    expected = alone(model, handle, {"a": 1.0})
    with handle.rows([{"a": 1.0}]):
        assert torch.equal(nn.DataParallel(model)(input_ids=tokens(1, 6)).logits, expected)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    lora = handle.stack.entries[0][0].adapters["model.layers.0.self_attn.q_proj.weight"]
    with handle.rows([{"a": 1.0}, {}]):
        found = layer(x)
    assert far(found[0], base[0] + x[0] @ torch.from_numpy(lora.dense()).T) < 1e-5
    assert torch.equal(found[1], base[1])


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing_computes_again_what_was_computed(inside: bool) -> None:
    model, handle = attached()
    model.train()
    model.enable_input_require_grads()

    def gradient(checkpointed: bool) -> torch.Tensor:
        (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
        model.zero_grad()
        with torch.enable_grad():
            with handle.rows(MIXTURES[:2]):
                loss = model(input_ids=tokens(2, 6)).logits.square().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    assert far(gradient(True), gradient(False)) < 1e-5


def test_checkpoints_of_passes_of_several_mixtures_are_not_guessed() -> None:
    model, handle = attached()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.enable_grad():
        loss = 0
        for mixture in MIXTURES[:2]:
            with handle.rows([mixture]):
                loss = loss + model(input_ids=tokens(1, 6)).logits.sum()
        with pytest.raises(ArgumentError, match=r"several mixtures; call backward\(\) inside"):
            loss.backward()


# ---- changes between passes


def test_changes_are_refused_inside_rows_and_inside_a_pass() -> None:
    model, handle = attached()
    lora = adapters(model)[0]
    changes: list[Callable[[], Any]] = [
        lambda: handle.push(lora), handle.pop, lambda: handle.remove("a"), lambda: handle.replace("a", lora),
        handle.detach]  # fmt: skip
    with handle.rows([{"a": 1.0}]):
        before = logits(model)
        for change in changes:
            with pytest.raises(ArgumentError, match=r"inside rows\(\)"):
                change()
        assert torch.equal(logits(model), before)
    seen = []

    def meanwhile(*_: Any) -> None:
        with pytest.raises(ArgumentError, match="inside a forward pass"):
            handle.set_scale("a", 0.5)
        seen.append(True)

    hook = model.model.layers[0].register_forward_hook(meanwhile)
    logits(model)
    hook.remove()
    assert seen == [True]


def test_a_removal_from_another_thread_is_said_to_who_still_wants_the_adapter() -> None:
    model, handle = attached()
    with handle.rows([{"a": 1.0}]):
        expected = logits(model)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(handle.remove, "b").result()
            assert far(logits(model), expected) < 1e-6  # the others' places have moved
            pool.submit(handle.remove, "a").result()
        with pytest.raises(LookupError, match="no adapter is named a"):
            logits(model)


def test_no_pass_is_torn_by_a_scale_set_meanwhile() -> None:
    model, handle = attached()
    want = []
    for scale in (0.0, 1.0):
        handle.set_scales({"a": scale, "b": scale})
        want.append(logits(model))
    stop = threading.Event()

    def toggle() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            handle.set_scales({"a": float(n % 2), "b": float(n % 2)})

    thread = threading.Thread(target=toggle)
    sys.setswitchinterval(1e-5)
    thread.start()
    torn = sum(min(far(found, one) for one in want) > 1e-5 for found in (logits(model) for _ in range(60)))
    stop.set()
    thread.join()
    sys.setswitchinterval(5e-3)
    assert torn == 0


def test_an_interrupt_inside_a_pass_leaves_nothing_behind() -> None:
    model, handle = attached()
    plain = logits(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), handle.rows([{"a": 1.0}]):
        logits(model)
    hook.remove()
    with ThreadPoolExecutor(1) as pool:  # a change from another thread does not wait for a pass that was left
        pool.submit(handle.set_scale, "a", 1.0).result(timeout=10)
    assert torch.equal(logits(model), plain)
    with handle.rows([{"b": 1.0}]):
        assert far(logits(model), plain) > 1e-4


# ---- compiled models

COMPILED: dict[str, Callable[[Any, Any], Any]] = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "fullgraph": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "model.compile()": lambda model, backend: (model.compile(backend=backend), model)[1],
    "model.forward": lambda model, backend: (
        model.__dict__.__setitem__("forward", torch.compile(model.forward, backend=backend)), model)[1],
    "a block": lambda model, backend: (
        model.model.layers.__setitem__(0, torch.compile(model.model.layers[0], backend=backend)), model)[1],
}  # fmt: skip


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_compiled_and_called_before_attach_is_compiled_anew(how: str) -> None:
    reference, handle = attached()
    expected = logits(reference)
    handle.detach()
    base = logits(reference)
    model = made("qwen2")
    live = COMPILED[how](model, "eager")
    assert far(logits(live), base) < 1e-6
    handle = attach(live, LoraStack([(lora, 1.0) for lora in adapters(reference)]))
    assert far(logits(live), expected) < 1e-5
    handle.detach()
    assert far(logits(live), base) < 1e-6
    handle = attach(live, adapters(reference)[0])
    with_one = logits(live)
    assert far(with_one, base) > 1e-4
    handle.detach()
    assert far(logits(live), base) < 1e-6


def test_scales_rows_and_pushes_to_hooked_layers_compile_nothing_again() -> None:
    model = made("qwen2")
    loras = adapters(model)
    handle = attach(model, LoraStack([(lora, 1.0) for lora in loras[:2]]))
    counter = CompileCounter()
    live = torch.compile(model, backend=counter)
    logits(live)
    once = counter.frame_count
    for scale in (0.5, 0.0, 1.0):
        handle.set_scale("a", scale)
        assert far(logits(live), logits(model)) < 1e-5
    assert counter.frame_count == once
    for mixture in ({"a": 1.0}, {"b": 0.5}, {"a": 0.2, "b": 0.3}):
        with handle.rows([mixture]):
            assert far(logits(live), logits(model)) < 1e-5
    rows = counter.frame_count
    for mixture in ({"b": 1.0}, {"b": 0.1}, {"a": 0.7, "b": 0.3}):
        with handle.rows([mixture]):
            assert far(logits(live), logits(model)) < 1e-5
        assert far(logits(live), logits(model)) < 1e-5
    assert counter.frame_count == rows
    reset = torch._dynamo.reset
    torch._dynamo.reset = lambda: pytest.fail("dynamo was reset")
    try:
        handle.push(loras[2])
        assert far(logits(live), logits(model)) < 1e-5
        handle.remove("c")
        assert far(logits(live), logits(model)) < 1e-5
    finally:
        torch._dynamo.reset = reset


def test_what_was_compiled_anew_is_said_once() -> None:
    import lorastack.torch.assembly as assembly

    assembly._said = False
    model = made("qwen2")
    live = torch.compile(model, backend="eager")
    logits(live)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            attach(live, adapters(model)[0]).detach()
            logits(live)
    assert [str(one.message) for one in caught if one.category is LoraStackWarning and "compile" in str(one.message)]
    assert sum("compiled anew" in str(one.message) for one in caught) == 1
