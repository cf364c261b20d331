"""Adapters and stacks go to other processes; stacks are read by threads while one changes them."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

import lorastack.core.stack as module
from lorastack import LoadedLora, LoraDelta, LoraStack, load, save
from lorastack.core import entry
from lorastack.formats.provenance import hashes

W = "blk.0.attn_q.weight"


def lora(value: float = 1.0, name: str = "one") -> LoadedLora:
    a, b = np.full((2, 6), value, np.float32), np.ones((4, 2), np.float32)
    return LoadedLora.from_tensors({W: (a, b)}, alpha=4, name=name)


def output(stack: LoraStack) -> np.ndarray:
    return stack.apply(W, np.arange(6, dtype=np.float32), 4)


def written(folder: Path, name: str) -> LoadedLora:
    """The adapter saved and loaded again, its numbers not read yet."""
    one = (
        lora() if name.endswith(".gguf") else LoadedLora.from_tensors({"q.weight": (np.ones((2, 6)), np.ones((4, 2)))})
    )
    return load(save(one, folder / name, architecture="llama" if name.endswith(".gguf") else None))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_everything_pickles_with_its_numbers(tmp_path: Path, protocol: int) -> None:
    reader = gguf.GGUFReader(save(lora(), tmp_path / "reader.gguf", architecture="llama"))
    baked = LoraStack([(lora(1), 0.5), (lora(2), 0.25)]).bake()
    every = [lora(), written(tmp_path, "x.gguf"), written(tmp_path, "x"), LoadedLora.from_gguf(reader), baked,
             lora().select("*").scaled(0.5)]  # fmt: skip
    raw = [pickle.dumps(one, protocol) for one in every]
    sums = [hashes(one) for one in every]
    for one in every:
        one.check()
    for path in sorted(tmp_path.rglob("*.gguf")) + sorted(tmp_path.rglob("*.safetensors")):
        path.write_bytes(b"")
    for one, data, total in zip(every, raw, sums, strict=True):
        again = pickle.loads(data)
        assert (again.name, again.naming, again.alpha, again.rank) == (one.name, one.naming, one.alpha, one.rank)
        assert dict(again.metadata) == dict(one.metadata)
        assert list(again.adapters) == list(one.adapters)
        for weight, delta in again.adapters.items():
            assert [f.stored for f in delta.factors] == [f.stored for f in one.adapters[weight].factors]
            np.testing.assert_array_equal(delta.dense(), one.adapters[weight].dense())
            with pytest.raises(ValueError, match="read-only"):
                delta.a[0, 0] = 5
        with pytest.raises(TypeError):
            again.metadata["x"] = 1  # type: ignore[index]
        assert set(total) == {path.name for path in again.files}


def test_a_stack_and_a_delta_pickle() -> None:
    stack = LoraStack([(lora(1), 0.5), (lora(2), -2.0)])
    before = output(stack)
    again = pickle.loads(pickle.dumps(stack))
    assert again.names == stack.names
    np.testing.assert_array_equal(output(again), before)
    again.push(lora(3))
    np.testing.assert_array_equal(output(stack), before)
    delta = pickle.loads(pickle.dumps(LoraDelta(np.ones((2, 3), np.float16), np.ones((4, 2)), 0.5)))
    assert (delta.scaling, delta.a.dtype) == (0.5, np.float16)


def test_a_stack_goes_to_a_process_that_shares_nothing() -> None:
    stack = LoraStack([(lora(1), 0.5)])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(output, [stack])
    np.testing.assert_array_equal(found, output(stack))


def test_names_that_nobody_has_are_kept_in_bounds() -> None:
    stack = LoraStack([(lora(), 1.0)])
    for n in range(5000):
        assert not stack.apply(f"unknown.{n}", np.ones(6, np.float32), 4).any()
    assert len(stack._packs) <= module._MOST_PACKS
    assert output(stack).any()
    assert W in stack._packs, "a weight that an adapter has is always kept"


@pytest.mark.parametrize("change", ["remove", "set_scale", "pop", "push", "clear"])
def test_a_reader_during_a_change_leaves_no_stale_sum(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = LoraStack([(lora(1, "a"), 1.0), (lora(2, "b"), 1.0)])
    real, inside, go_on = entry.PackedWeight, threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        inside.set()
        assert go_on.wait(10)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(entry, "PackedWeight", slow)
    reader = threading.Thread(target=output, args=(stack,))
    reader.start()
    assert inside.wait(10)
    {"remove": lambda: stack.remove("b"), "set_scale": lambda: stack.set_scale("b", 7.0), "pop": stack.pop,
     "push": lambda: stack.push(lora(5)), "clear": stack.clear}[change]()  # fmt: skip
    go_on.set()
    reader.join()
    np.testing.assert_array_equal(output(stack), output(LoraStack(stack.entries)))


def test_readers_see_the_stack_as_it_was_at_one_time() -> None:
    stack = LoraStack([(lora(1, "a"), 1.0), (lora(1, "b"), -1.0)])
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if not set(np.unique(output(stack))) <= {0.0, 60.0}:
                wrong.append(output(stack))

    threads = [threading.Thread(target=read) for _ in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(500):
            entry = stack.remove("b")
            stack.push(*entry)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not wrong
    assert not output(stack).any()
