"""A live model: attached stacks against PEFT and against the bare pair of products on the same layer.

Run: python benchmarks/live.py [--threads N]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timing import interleave, once, ratio
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lorastack import LoadedLora, LoraStack
from lorastack.torch import attach

ADAPTERS, RANK, HIDDEN = 8, 16, 2048


class One(nn.Module):
    """A single linear layer, so that nothing else is measured."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def triplets(dtype: torch.dtype) -> tuple[One, One, One]:
    """The same layer three times: bare, for lorastack, for PEFT."""
    base, ours, theirs = One(dtype), One(dtype), One(dtype)
    ours.lin.weight = theirs.lin.weight = base.lin.weight  # one copy, so that all find it equally near
    return base, ours.eval(), theirs


def save_adapters(model: nn.Module, folder: Path, targets: list[str], count: int = ADAPTERS) -> list[Path]:
    """Adapters of random factors, saved by PEFT."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="a0")
    for n in range(1, count):
        peft.add_adapter(f"a{n}", config)
    peft.save_pretrained(str(folder))
    peft.unload()
    return [folder / f"a{n}" for n in range(count)]


def load_peft(model: nn.Module, paths: list[Path]) -> PeftModel:
    peft = PeftModel.from_pretrained(model, str(paths[0]), adapter_name="a0")
    for n, path in enumerate(paths[1:], 1):
        peft.load_adapter(str(path), adapter_name=f"a{n}")
    peft.base_model.set_adapter([f"a{n}" for n in range(len(paths))])
    return peft.eval()


def added(seconds: dict[str, list[float]], name: str) -> list[float]:
    """What a contender adds to the base, round by round."""
    return [max(t - b, 1e-9) for t, b in zip(seconds[name], seconds["base"], strict=True)]


def answer_at_once(layer: nn.Linear, output: torch.Tensor) -> None:
    """Let a layer hand out a stored output, so that a call costs what was put around the layer and no more.

    The difference of two calls of 200 ms says nothing about additions of 10. Both contenders add in place
    to what they are handed, as they do to a product of their own.
    """
    layer.forward = lambda x: output  # type: ignore[method-assign]


def bench_layer(dtype: torch.dtype, tokens: int, folder: Path) -> None:
    torch.manual_seed(0)
    base, ours, theirs = triplets(dtype)
    paths = save_adapters(One(dtype), folder / f"layer-{dtype}-{tokens}".replace("torch.", ""), ["lin"])
    handle = attach(ours.eval(), LoraStack([(LoadedLora.load(path), 1.0) for path in paths]))
    peft = load_peft(theirs, paths)
    layer = handle._layers["lin.weight"]
    a, b, s = layer.a.clone(), layer.b.clone(), layer.s.clone()
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype)

    def pair() -> torch.Tensor:
        out = base.lin(x)
        return torch.addmm(out.view(-1, HIDDEN), F.linear(x, a).view(-1, len(s)) * s, b.t()).view_as(out)

    with torch.inference_mode():
        seconds = interleave(
            {"base": lambda: base(x), "base + bare pair": pair, "lorastack": lambda: ours(x), "peft": lambda: peft(x)}
        )
    print(f"8 active adapters, {tokens} token(s), {dtype}")
    for name in ("base + bare pair", "lorastack", "peft"):
        against = ratio(seconds[name], seconds["base + bare pair"])
        print(f"  {name:22} {median(seconds[name]) * 1e6:9.1f} us   x base + bare pair {against}")
    print(f"  peft adds {ratio(added(seconds, 'peft'), added(seconds, 'lorastack'))} times what lorastack adds")


def bench_rows(dtype: torch.dtype, tokens: int, folder: Path) -> None:
    torch.manual_seed(0)
    base, ours, theirs = triplets(dtype)
    paths = save_adapters(One(dtype), folder / f"rows-{dtype}-{tokens}".replace("torch.", ""), ["lin"])
    handle = attach(ours.eval(), LoraStack([(LoadedLora.load(path), 1.0) for path in paths]))
    peft = load_peft(theirs, paths)
    x = torch.randn(ADAPTERS, tokens, HIDDEN, dtype=dtype)
    names = [f"a{n}" for n in range(ADAPTERS)]
    mixtures = [{name: 1.0} for name in names]
    with torch.inference_mode(), handle.rows(mixtures):
        expected = peft(x, adapter_names=names)
        torch.testing.assert_close(ours(x).float(), expected.float(), rtol=2e-2, atol=2e-2)
        stored = base(x)
        answer_at_once(ours.lin, stored.clone())
        answer_at_once(peft.base_model.model.lin.base_layer, stored.clone())
        seconds = interleave({"lorastack": lambda: ours(x), "peft": lambda: peft(x, adapter_names=names)})
    part = ratio(seconds["lorastack"], seconds["peft"])
    print(
        f"8 rows with 8 adapters, {tokens} token(s) each, {dtype}: lorastack adds x {part} of what adapter_names adds "
        f"({median(seconds['lorastack']) * 1e3:.2f} and {median(seconds['peft']) * 1e3:.2f} ms)"
    )


def bench_load(folder: Path) -> None:
    """Loading and attaching one adapter to a model, and the eighth on top of seven."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
                         num_key_value_heads=4, vocab_size=1000)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paths = save_adapters(model, folder / "load", targets)
    weights = paths[0] / "adapter_model.safetensors"

    def ours() -> None:
        attach(model, LoadedLora.load(paths[0])).detach()

    def theirs() -> None:
        PeftModel.from_pretrained(model, str(paths[0])).unload()

    seconds = interleave({"bare file read": weights.read_bytes, "lorastack": ours, "peft": theirs}, rounds=8)
    print(f"load and attach one adapter, {weights.stat().st_size / 2**20:.0f} MiB")
    for name, values in seconds.items():
        print(
            f"  {name:22} {median(values) * 1e3:9.2f} ms   x bare file read {ratio(values, seconds['bare file read'])}"
        )
    print(f"  peft takes {ratio(seconds['peft'], seconds['lorastack'])} times as long as lorastack")
    pushes = [[] for _ in paths]
    for _ in range(8):
        handle = attach(model, LoadedLora.load(paths[0]))
        for n, path in enumerate(paths):
            if n:
                pushes[n].append(once(lambda path=path, handle=handle: handle.push(LoadedLora.load(path))))
        handle.detach()
        pushes[0].append(once(lambda: attach(model, LoadedLora.load(paths[0])).detach()))
    print("  push one by one, ms:", " ".join(f"{median(times) * 1e3:.1f}" for times in pushes))
    stack = LoraStack([(LoadedLora.load(path), 1.0) for path in paths])
    with attach(model, stack) as handle:
        scale = [once(lambda: handle.set_scale("a3", 0.5)) for _ in range(50)]
        files = sum((path / "adapter_model.safetensors").stat().st_size for path in paths)
        held = f"factors held: {handle.report.nbytes / files:.2f} x the files"
        print(f"  a scale change: {median(scale) * 1e6:.0f} us; {held}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=0, help="0 measures one thread and then all")
    chosen = parser.parse_args().threads
    warnings.simplefilter("ignore")
    for threads in [chosen] if chosen else [1, torch.get_num_threads()]:
        torch.set_num_threads(threads)
        print(f"== {threads} thread(s)")
        with tempfile.TemporaryDirectory() as scratch:
            for dtype in (torch.float32, torch.bfloat16):
                bench_layer(dtype, 1, Path(scratch))
                for tokens in (1, 32):
                    bench_rows(dtype, tokens, Path(scratch))
            bench_load(Path(scratch))


if __name__ == "__main__":
    main()
