"""Mixtures by row on a GPU: each way to compute one weight, and steps of a model, against base, PEFT and bytes.

Run: python benchmarks/gpu.py [--out FOLDER] [--only PART]. Needs CUDA and Triton. ``--rehearse`` runs every part on a
CPU at small sizes, in Triton's interpreter: its figures say nothing. Every case of one weight is checked against
float64 before it is timed, and every other against a way that was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

REHEARSE = "--rehearse" in sys.argv
if REHEARSE:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lorastack import LoadedLora, LoraStack  # noqa: E402
from lorastack.torch import Handle, attach  # noqa: E402
from lorastack.torch.layer import LiveLayer  # noqa: E402
from lorastack.torch.passes import CURRENT  # noqa: E402
from lorastack.torch.ways import Way, board, choice, pages  # noqa: E402
from lorastack.torch.ways.dense import DENSE  # noqa: E402
from lorastack.torch.ways.pages import PAGES  # noqa: E402
from lorastack.torch.ways.shrunk import Shrunk  # noqa: E402

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


def with_way(way: Way) -> None:
    """Every layer computes its rows so."""
    choice.own = lambda layer: way


def mixtures_of(rows: int, adapters: int, per: int, shift: int = 0) -> list[dict[str, float]]:
    return [{f"a{(i * 7 + j * 13 + shift) % adapters}": 0.3 + 0.1 * j for j in range(per)} for i in range(rows)]


def one_weight(copy: float) -> None:
    """One square weight: added time of each way, beside the base's product and the bytes of factors that are used."""
    hidden, many = (64, 2) if REHEARSE else (4096, 24)
    cases = [
        (1, 1, 1),
        (8, 8, 1),
        (32, 16, 1),
        (32, 32, 1),
        (32, 64, 3),
        (128, 64, 1),
        (256, 64, 1),
        (256, 64, 3),
        (2048, 4, 1),
    ]
    for tokens, adapters, per in cases[:3] if REHEARSE else cases:
        rows = min(tokens, 256)
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(hidden, hidden, bias=False) for _ in range(many)]).to(DEVICE, DTYPE).eval()
        loras = loras_for({f"{n}.weight": (hidden, hidden) for n in range(many)}, adapters)
        x = torch.randn(rows, tokens // rows, hidden, device=DEVICE, dtype=DTYPE)
        mixtures = mixtures_of(rows, adapters, per)
        base = seconds(lambda m=model, x=x: [layer(x) for layer in m]) / many
        used = len({name for one in mixtures for name in one})
        row = {
            "part": "one weight",
            "tokens": tokens,
            "adapters": adapters,
            "per_row": per,
            "base_us": round(base * 1e6, 2),
            "floor_us": round((used * RANK * 2 * hidden * 2 + tokens * hidden * 6) / copy * 1e6, 2),
        }
        for name, (way, asked) in ASKED.items():
            with_way(way)
            stack = LoraStack([(lora, 1.0) for lora in loras])
            with attach(model, stack) as handle, handle.rows(mixtures, way=asked):
                error = error_of(model[0], loras, "0.weight", x, mixtures)
                run = seconds(lambda m=model, x=x: [layer(x) for layer in m]) / many
            row |= {f"{name}_us": round((run - base) * 1e6, 2), f"{name}_error": f"{error:.1e}"}
            assert error < 2e-2, (name, error)
        say(**row)


def error_of(layer: nn.Module, loras: list[LoadedLora], name: str, x: torch.Tensor, mixtures: list) -> float:
    """Of the first rows' sums in float64, relative to what the adapters add."""
    found, weight = layer(x).double(), layer.weight.double()
    worst = 0.0
    for n in range(0, len(mixtures), max(len(mixtures) // 8, 1)):
        delta = (
            sum(
                (
                    s * torch.from_numpy(next(lora for lora in loras if lora.name == own).adapters[name].dense())
                    for own, s in mixtures[n].items()
                ),
                torch.zeros(1),
            )
            .to(DEVICE)
            .double()
        )
        base, added = x[n].double() @ weight.T, x[n].double() @ delta.T
        worst = max(worst, float((found[n] - base - added).norm() / (base + added).norm()))
    return worst


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


def steps() -> None:
    """A decode step and a prefill of four 8B-shaped layers; a composition that was never seen; PEFT."""
    model, weights = model_of()
    for rows, length, adapters, per in [
        (1, 1, 1, 1),
        (8, 1, 8, 1),
        (32, 1, 16, 1),
        (32, 1, 16, 3),
        (128, 1, 64, 1),
        (4, 512, 4, 1),
    ][: 2 if REHEARSE else None]:
        ids = torch.randint(3, 64, (rows, length), device=DEVICE)

        def call(ids: torch.Tensor = ids) -> object:
            return model(ids, use_cache=False).logits

        base, eager = seconds(call), seconds(call, captured=False)
        loras = loras_for(weights, adapters)
        row = {
            "part": "step",
            "rows": rows,
            "tokens": length,
            "adapters": adapters,
            "per_row": per,
            "base_ms": round(base * 1e3, 4),
        }
        for name, (way, asked) in ASKED.items():
            with_way(way)
            with attach(model, LoraStack([(lora, 1.0) for lora in loras])) as handle:
                row |= {
                    f"{name}_{key}": value
                    for key, value in rows_figures(handle, call, base, eager, rows, adapters, per, asked).items()
                }
        say(**row)


def rows_figures(
    handle: Handle, call: Callable, base: float, eager: float, rows: int, adapters: int, per: int, asked: str | None
) -> dict[str, float]:
    shift = 0

    def new() -> object:
        nonlocal shift
        shift += 1
        with handle.rows(mixtures_of(rows, adapters, per, shift), way=asked):
            return call()

    with handle.rows(mixtures_of(rows, adapters, per), way=asked):
        captured, warm = seconds(call), seconds(call, captured=False)
    first = seconds(new, captured=False)
    return {
        "over_base": round(captured / base, 3),
        "eager_over_base": round(warm / eager, 3),
        "new_over_warm": round(first / warm, 3),
    }


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Every layer has a shrink of its own."""
    expected = Shrunk._expect
    Shrunk._expect = lambda self, layer: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Shrunk._expect = expected  # type: ignore[method-assign]


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16 rows, however many tokens a row has."""
    tiles = board.TILES
    board.TILES = ((0, 16),)
    try:
        yield
    finally:
        board.TILES = tiles


@contextlib.contextmanager
def ahead(handle: Handle) -> Iterator[None]:
    """The shrink of a layer runs on a side stream, beside the base's product: launched before, waited for after."""
    side = torch.cuda.Stream() if DEVICE == "cuda" else None
    expand = pages.expand

    def before(layer: LiveLayer, x: torch.Tensor) -> None:
        running = CURRENT.running
        if running is None or running.mixture is None or any(known.is_of(x) for known in running.shrunk):
            return
        boards = running.mixture.boards(running, x.numel() // x.shape[-1], layer.layout)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            made = pages._computed([layer, *layer.followers], x, boards)
        if side is not None:
            x.record_stream(side)
            for part in (part for parts in made.values() for part in parts):
                part.record_stream(torch.cuda.current_stream())
        running.shrunk = (Shrunk(x, layer, made), *running.shrunk)[: pages._INPUTS]

    def waiting(*given: object) -> None:
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        expand(*given)

    hooks = [
        layer.place.module.register_forward_pre_hook(lambda module, args, layer=layer: before(layer, args[0]))
        for layer in handle._assembly.live_layers()
    ]
    pages.expand = waiting
    try:
        yield
    finally:
        pages.expand = expand
        for hook in hooks:
            hook.remove()


def one_thing_less() -> None:
    """A decode step and a prefill as they are, and without what is there for speed; and the shrink on a side stream."""
    model, weights = model_of()
    with_way(PAGES)
    for rows, length, adapters, per in [(32, 1, 16, 1), (32, 1, 16, 3), (4, 512, 4, 1)][: 1 if REHEARSE else None]:
        rows, adapters = (4, 2) if REHEARSE else (rows, adapters)
        ids = torch.randint(3, 64, (rows, length), device=DEVICE)

        def call(ids: torch.Tensor = ids) -> torch.Tensor:
            return model(ids, use_cache=False).logits

        row = {"part": "one thing less", "rows": rows, "tokens": length, "adapters": adapters, "per_row": per}
        base = seconds(call)
        stack = LoraStack([(lora, 1.0) for lora in loras_for(weights, adapters)])
        wanted = None
        for name in ("as it is", "each its own shrink", "tiles of 16", "shrink on a side stream"):
            with contextlib.ExitStack() as parts:
                if name == "each its own shrink":
                    parts.enter_context(alone())
                if name == "tiles of 16":
                    parts.enter_context(small_tiles())
                handle = parts.enter_context(attach(model, stack))
                if name == "shrink on a side stream":
                    parts.enter_context(ahead(handle))
                parts.enter_context(handle.rows(mixtures_of(rows, adapters, per)))
                found = [call() for _ in range(2)][-1].float()
                wanted = found if wanted is None else wanted
                error = float((found - wanted).norm() / wanted.norm())
                assert error < 2e-2, (name, error)
                row[f"{name}, over base"] = round(seconds(call) / base, 3)
        say(**row)


def compiled() -> None:
    """A compiled decode step: the kernels as one operator in its graph, against dense products there."""
    model, weights = model_of()
    rows, adapters = (4, 2) if REHEARSE else (32, 16)
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    stack = LoraStack([(lora, 1.0) for lora in loras_for(weights, adapters)])
    row: dict[str, object] = {"part": "compiled", "rows": rows, "adapters": adapters}
    torch._dynamo.reset()
    live = torch.compile(model, backend="aot_eager" if REHEARSE else "inductor")
    base = seconds(lambda: live(ids, use_cache=False))
    for name, way in WAYS.items():
        with_way(way)
        with attach(model, stack) as handle, handle.rows(mixtures_of(rows, adapters, 1)):
            wanted = model(ids, use_cache=False).logits.float()
            torch._dynamo.reset()
            live = torch.compile(model, backend="aot_eager" if REHEARSE else "inductor")
            found = live(ids, use_cache=False).logits.float()
            error = float((found - wanted).norm() / wanted.norm())
            assert error < 2e-2, (name, error)
            row[f"{name}_over_base"] = round(seconds(lambda live=live: live(ids, use_cache=False)) / base, 3)
    say(**row)


def replayed() -> None:
    """A graph of one composition, replayed with another: more mixtures, more pages in a row, a row of the base."""
    model, weights = model_of()
    rows = 4 if REHEARSE else 32
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    others = [{} if n % 5 == 0 else one for n, one in enumerate(mixtures_of(rows, 8, 3))]
    for name, way in WAYS.items():
        with_way(way)
        with attach(model, LoraStack([(lora, 1.0) for lora in loras_for(weights, 8)])) as handle:
            with handle.rows(others):
                expected = model(ids, use_cache=False).logits.float()
            with handle.rows([{"a0": 1.0}] * rows):
                plan = handle.current()
                call, kept = replayable(lambda: model(ids, use_cache=False).logits)
                start = time.perf_counter()
                plan.write(others)
                took = time.perf_counter() - start
                call()
                error = float((kept[0].float() - expected).norm() / expected.norm())
        assert error < 1e-2, (name, error)
        say(part="replayed with another composition", way=name, error=f"{error:.1e}", write_us=round(took * 1e6))


def replayable(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """(What computes again, its result); on a CPU there is no graph, and the call itself is made again."""
    for _ in range(2):
        kept = [call()]
    if DEVICE == "cpu":
        return lambda: kept.__setitem__(0, call()), kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call()]
    return lambda: (graph.replay(), torch.cuda.synchronize()), kept


def against_peft() -> None:
    """What rows add to a decode step, of what PEFT's ``adapter_names`` add."""
    from peft import LoraConfig, get_peft_model

    rows, adapters = (4, 2) if REHEARSE else (32, 16)
    model, weights = model_of()
    ids = torch.randint(3, 64, (rows, 1), device=DEVICE)
    base = seconds(lambda: model(ids, use_cache=False), captured=False)
    with_way(PAGES)
    mixtures = [{f"a{n % adapters}": 1.0} for n in range(rows)]
    with attach(model, LoraStack([(lora, 1.0) for lora in loras_for(weights, adapters)])) as handle:  # noqa: SIM117
        with handle.rows(mixtures):
            ours = seconds(lambda: model(ids, use_cache=False), captured=False)
    targets = sorted({name.split(".")[-2] for name in weights})
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="a0")
    for n in range(1, adapters):
        peft.add_adapter(f"a{n}", config)
    names = [next(iter(one)) for one in mixtures]
    theirs = seconds(lambda: peft.eval()(input_ids=ids, adapter_names=names, use_cache=False), captured=False, rounds=5)
    say(
        part="peft",
        rows=rows,
        adapters=adapters,
        ours_over_base=round(ours / base, 3),
        peft_over_base=round(theirs / base, 3),
        of_what_peft_adds=round((ours - base) / (theirs - base), 3),
    )


PARTS: dict[str, Callable[[float], None]] = {
    "weight": one_weight,
    "steps": lambda copy: steps(),
    "less": lambda copy: one_thing_less(),
    "replayed": lambda copy: replayed(),
    "compiled": lambda copy: compiled(),
    "peft": lambda copy: against_peft(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    said = parser.parse_args()
    if not REHEARSE and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --rehearse runs the parts on a CPU, for their errors only")
    warnings.simplefilter("ignore")
    with torch.no_grad():  # inference tensors do not tell whether they were changed, so that layers share nothing
        copy = bandwidth()
        name = "rehearsal on a CPU" if REHEARSE else torch.cuda.get_device_name()
        say(part="device", name=name, torch=torch.__version__, copy_tb_s=round(copy * 1e-12, 2))
        for part, run in PARTS.items():
            if said.only in (None, part):
                run(copy)
    if said.out:
        (said.out / "gpu.json").write_text(json.dumps(FOUND, indent=1))


if __name__ == "__main__":
    main()
