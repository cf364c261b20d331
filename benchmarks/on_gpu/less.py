"""Less: steps without what is there for speed, one thing at a time, and with the shrink on a side stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lorastack.torch import Handle, attach
from lorastack.torch.layer import LiveLayer
from lorastack.torch.passes import CURRENT
from lorastack.torch.ways import board, pages
from lorastack.torch.ways.pages import PAGES
from lorastack.torch.ways.shrunk import Shrunk
from on_gpu.setting import DEVICE, REHEARSE, loras_for, mixtures_of, model_of, say, seconds, stack_of, with_way


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
        stack = stack_of(loras_for(weights, adapters))
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
