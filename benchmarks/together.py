"""Two generations of 200 tokens with mixtures of their own, side by side in two threads, and one after the other.

Run: python benchmarks/together.py [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from live import save_adapters
from timing import interleave, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from lorastack import LoadedLora, LoraStack
from lorastack.torch import Handle, attach

TOKENS, RANK = 200, 16
#: hidden size -> layers: a model whose passes are Python's work mostly, and one whose passes are products.
SIZES = {64: 4, 384: 4}
MIXTURES = [{"a0": 1.0}, {"a0": 0.3, "a1": 0.7}]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=SIZES[hidden],
                         num_attention_heads=hidden // 16, num_key_value_heads=hidden // 16, vocab_size=1000,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model: LlamaForCausalLM, handle: Handle | None, n: int) -> torch.Tensor:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():  # which each thread has to say for itself
        if handle is None:
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        with handle.rows([MIXTURES[n]]):
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def both(
    model: LlamaForCausalLM, handle: Handle | None, pool: ThreadPoolExecutor
) -> tuple[Callable[[], list[torch.Tensor]], Callable[[], list[torch.Tensor]]]:
    """The two generations one after the other, and side by side."""

    def after() -> list[torch.Tensor]:
        return [generate(model, handle, n) for n in range(2)]

    def beside() -> list[torch.Tensor]:
        return list(pool.map(lambda n: generate(model, handle, n), range(2)))

    return after, beside


def bench(hidden: int, rounds: int, folder: Path) -> None:
    bare, model = made(hidden), made(hidden)
    paths = save_adapters(model, folder / str(hidden), TARGETS, 2)
    handle = attach(model, LoraStack([(LoadedLora.load(path), 1.0) for path in paths]))
    with ThreadPoolExecutor(2) as pool:
        after, beside = both(model, handle, pool)
        order: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_: order.append(threading.get_ident()))
        assert all(torch.equal(x, y) for x, y in zip(after(), beside(), strict=True))
        hook.remove()
        changes = sum(x != y for x, y in itertools.pairwise(order[2 * TOKENS :]))
        bare_after, bare_beside = both(bare, None, pool)
        seconds = interleave(
            {"after": after, "beside": beside, "bare after": bare_after, "bare beside": bare_beside}, rounds=rounds
        )
    print(f"hidden {hidden}, {SIZES[hidden]} layers; {changes} changes of turn in {2 * TOKENS} passes")
    for name in ("", "bare "):
        beside_of_after = ratio(seconds[f"{name}beside"], seconds[f"{name}after"])
        print(
            f"  {'base alone' if name else 'lorastack':12} side by side takes {beside_of_after} of one after the other "
            f"({median(seconds[f'{name}beside']):.2f} and {median(seconds[f'{name}after']):.2f} s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    for used in sorted({1, threads}):
        torch.set_num_threads(used)
        print(f"== {used} thread(s) in torch")
        with tempfile.TemporaryDirectory() as scratch:
            for hidden in SIZES:
                bench(hidden, rounds, Path(scratch))


if __name__ == "__main__":
    main()
