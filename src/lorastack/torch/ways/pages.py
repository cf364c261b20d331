"""Pages: two Triton kernels over tiles of rows with one page set; for CUDA, and for the interpreter in tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorastack.torch.passes import Pass
from lorastack.torch.ways import Layer
from lorastack.torch.ways.board import Board
from lorastack.torch.ways.launch import TOGETHER, add_pages, expand, shrink
from lorastack.torch.ways.shrunk import Shrunk

#: Inputs that are remembered: latent attention has another between the two that are the same.
_INPUTS = 2


class Pages:
    """Shrink and expand."""

    name = "pages"

    def add(self, layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor, in_place: bool) -> torch.Tensor:
        mixture = running.mixture
        tokens, n_in = x.numel() // x.shape[-1], x.shape[-1]
        if mixture.index is None:
            mixture.check(running, x, layer.name)
        boards = mixture.boards(running, tokens, layer.layout)
        if torch.compiler.is_compiling():
            return _as_one_operator(layer, boards, x.reshape(tokens, n_in), output)
        y = output if in_place else output.clone(memory_format=torch.contiguous_format)
        parts = _shrunk(layer, running, x, boards)
        for board, part in zip(boards, parts, strict=True):
            expand(y.view(tokens, -1), n_in, layer.b, part, layer.layout.pages, board.arrays)
        return y


def _shrunk(layer: Layer, running: Pass, x: torch.Tensor, boards: Sequence[Board]) -> list[torch.Tensor]:
    """The partial sums of a layer, one for each board; those of the layers that are expected to share ``x`` with it."""
    if x.is_inference():  # such a tensor does not tell whether it was changed
        return _computed([layer], x, boards)[id(layer)]
    for known in running.shrunk:
        if known.is_of(x):
            return known.take(layer) or _computed([layer], x, boards)[id(layer)]
    made = _computed([layer, *layer.followers], x, boards)
    parts = made.pop(id(layer))
    running.shrunk = (Shrunk(x, layer, made), *running.shrunk)[:_INPUTS]
    return parts


def _computed(layers: Sequence[Layer], x: torch.Tensor, boards: Sequence[Board]) -> dict[int, list[torch.Tensor]]:
    flat = x.reshape(-1, x.shape[-1])
    made: dict[int, list[torch.Tensor]] = {id(layer): [] for layer in layers}
    for board in boards:
        for at in range(0, len(layers), TOGETHER):
            few = layers[at : at + TOGETHER]
            parts = shrink(flat, [one.a for one in few], [one.layout.pages for one in few], board.arrays)
            for one, part in zip(few, parts, strict=True):
                made[id(one)].append(part)
    return made


def _as_one_operator(layer: Layer, boards: Sequence[Board], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    y = output.clone(memory_format=torch.contiguous_format)
    flat = y.view(x.shape[0], -1)
    for board in boards:
        add_pages(flat, x, layer.a, layer.b, *layer.layout.pages, board.memory, board.tile, board.tiles, board.slots)
    return y


PAGES = Pages()
