"""Places: the weights of a model as a grid of modules by layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lorastack.core.target import GGUF_STEM, place_of

#: The column of weights that are in no numbered layer.
NO_LAYER = "none"
#: With more rows than this nobody reads them: numbers inside names (experts, blocks) are then taken together.
_MOST_ROWS = 40
#: kohya's names, whose parts have ``_`` between them: block of a UNet or layer of a text encoder, and what is in it.
_KOHYA = re.compile(r"(lora_\w+?)_(\d{1,9})_(\w+)")


class Grid(NamedTuple):
    """Which weights lie at each (module, layer); several experts may share a place."""

    modules: list[str]
    layers: list[str]
    cells: dict[tuple[str, str], list[int]]

    def values(self, value: Callable[[list[int]], float | None]) -> list[list[float | None]]:
        """Rows of what ``value`` makes of the weights at each place; None where there are none."""
        return [
            [value(self.cells[m, layer]) if (m, layer) in self.cells else None for layer in self.layers]
            for m in self.modules
        ]


def split(name: str) -> tuple[str, int | None, str]:
    """What stands before the layer's number, the layer, and the module.

    >>> split("model.layers.3.self_attn.q_proj.weight"), split("blk.3.attn_q.weight")
    (('model.layers', 3, 'q_proj'), ('blk', 3, 'q_proj'))
    >>> split("transformer.h.0.attn.c_attn.weight"), split("lm_head.weight")
    (('transformer.h', 0, 'attn.c_attn'), ('', None, 'lm_head'))
    >>> split("lora_unet_down_blocks_1_attentions_0_proj_in")
    ('lora_unet_down_blocks', 1, 'attentions_0_proj_in')
    """
    stem = name.removesuffix(".weight")
    if "." not in stem and (match := _KOHYA.fullmatch(stem)):
        return match[1], int(match[2]), match[3]
    match = re.fullmatch(r"(.*?)\.?(?<![^.])(\d{1,9})\.(.+)", stem)
    if not match:
        return "", None, stem
    known = place_of(name)
    return match[1], int(match[2]), known[0].name if known else match[3]


def grid(names: Sequence[str]) -> Grid:
    """The grid of weights by their names: modules in the order of a layer, then what is in none."""
    parts = [split(name) for name in names]
    # A model of two towers (encoder and decoder) has every layer number twice.
    several = len({before for before, layer, _ in parts if layer is not None}) > 1
    rows = [f"{before}: {module}" if several and layer is not None else module for before, layer, module in parts]
    if len(set(rows)) > _MOST_ROWS:
        rows = [re.sub(r"\d+", "*", row) for row in rows]
    cells: dict[tuple[str, str], list[int]] = {}
    for n, (row, (_, layer, _)) in enumerate(zip(rows, parts, strict=True)):
        cells.setdefault((row, NO_LAYER if layer is None else str(layer)), []).append(n)
    layers = [str(n) for n in sorted({layer for _, layer, _ in parts if layer is not None})]
    if any(layer is None for _, layer, _ in parts):
        layers.append(NO_LAYER)
    order = list(GGUF_STEM)
    outside = {row for row, layer in cells if layer == NO_LAYER}
    first = {row: n for n, row in reversed(list(enumerate(rows)))}

    def rank(row: str) -> tuple[bool, int, int]:
        module = row.rpartition(": ")[2]
        return row in outside, order.index(module) if module in order else len(order), first[row]

    return Grid(sorted(first, key=rank), layers, cells)
