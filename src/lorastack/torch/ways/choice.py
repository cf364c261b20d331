"""Choice: which way a layer's rows are computed; the only place that says so.

By itself a layer's way depends on the layer and on what is attached, never on the batch, so that a row is the same to
the bit whatever its neighbours are. ``fast`` looks at the batch, and gives that up.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lorastack.errors import ArgumentError, UnsupportedError, did_you_mean
from lorastack.torch.passes import Pass
from lorastack.torch.pool import PAGE
from lorastack.torch.rows import Mixture
from lorastack.torch.ways import Layer, Way
from lorastack.torch.ways.dense import DENSE
from lorastack.torch.ways.each import EACH
from lorastack.torch.ways.pages import PAGES
from lorastack.ways import Way as Out
from lorastack.ways import ways

#: Up to so many ranks all rows share two products; beyond, on a CPU, each has its own.
DENSE_RANKS = 2 * PAGE
_BEST = Out("leave way= out: each layer has the best that is there", None)
#: Multiplications that take a CPU as long as a product more, by layers of 512 and of 2048.
_A_PRODUCT = 400_000
#: What users may ask for.
NAMES = ("dense", "each", "fast", "pages")
#: What a layer is said to be computed in that has no way: adapter after adapter.
IN_ORDER = "in order"
_BY_NAME: dict[str, Way] = {"dense": DENSE, "each": EACH, "pages": PAGES}


def own(layer: Layer) -> Way | None:
    """The way of a layer by itself; None: adapter after adapter."""
    if layer.a.device.type == "cpu" and (len(layer.a) > DENSE_RANKS or layer.in_order):
        return EACH
    if layer.a.device.type == "cuda" and has_pages(layer):
        return PAGES
    return None if layer.in_order else DENSE


def has_pages(layer: Layer) -> bool:
    """Whether the page kernels can compute a layer."""
    runs = layer.a.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and there_is_triton() and layer.a.dtype.itemsize <= 4


@cache
def there_is_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def check_name(way: str | None) -> None:
    """ArgumentError unless a way is called so, or none is asked for."""
    if way is not None and way not in NAMES:
        raise ArgumentError(f"no way is named {way!r}; there are {', '.join(NAMES)}{did_you_mean(str(way), NAMES)}")


def may_be_paged(layer: Layer, way: str | None) -> bool:
    """Whether a layer may be computed by pages in a plan for which that way was asked."""
    return layer.way is PAGES if way is None else way in ("fast", "pages") and has_pages(layer)


def said(layer: Any) -> str:
    """What a layer that nothing was asked of is computed in."""
    if layer.way is not None:
        return str(layer.way.name)
    return IN_ORDER if layer.in_order or layer.gated else DENSE.name


def check_pages(way: str | None, layers: Sequence[Layer]) -> None:
    """UnsupportedError when pages are asked for where no layer has them."""
    if way == "pages" and layers and not any(map(has_pages, layers)):
        what = "a CUDA device and layers of 32 bits or fewer" if there_is_triton() else "Triton (pip install triton)"
        raise UnsupportedError(f"pages need {what}{ways(_BEST)}")


def of_pass(layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor) -> Way | None:
    """The way of a layer in a pass; None: adapter after adapter."""
    way: Way | None = layer.way
    if way is None:
        return None
    if torch.compiler.is_compiling():
        return _compiled(layer, running, x, output)
    mixture: Mixture = running.mixture
    backward = output.requires_grad and torch.is_grad_enabled()
    if mixture.way is None and not backward:
        if mixture.taken:
            mixture.taken.pop(layer.name, None)
        return way
    if backward:
        way = None if layer.in_order else DENSE
    else:
        way = _asked(layer, mixture, running, x)
    mixture.taken[layer.name] = IN_ORDER if way is None else way.name
    return way


def _compiled(layer: Layer, running: Pass, x: torch.Tensor, output: torch.Tensor) -> Way | None:
    """Pages where their board is there already, else dense."""
    mixture: Mixture = running.mixture
    paged = layer.way is PAGES and mixture.way in (None, "pages") and not output.requires_grad
    if paged and mixture.foreseen(x.numel() // x.shape[-1], layer.layout):
        return PAGES
    return None if layer.in_order else DENSE


def _asked(layer: Layer, mixture: Mixture, running: Pass, x: torch.Tensor) -> Way | None:
    name = mixture.way
    if name == "fast":
        return _fast(layer, mixture, running, x)
    if (name == "pages" and not has_pages(layer)) or (name == "dense" and layer.in_order):
        return own(layer)
    return _BY_NAME[name or ""]


def _fast(layer: Layer, mixture: Mixture, running: Pass, x: torch.Tensor) -> Way | None:
    """The better of dense products and the layer's own way, by figures that were measured."""
    mine = own(layer)
    if layer.in_order or mine is DENSE:
        return mine
    tokens = x.numel() // x.shape[-1]
    if mine is EACH:
        products = len(mixture.tiles(layer.layout).runs)
        return DENSE if tokens * len(layer.a) * (layer.a.shape[1] + layer.b.shape[1]) <= _A_PRODUCT * products else EACH
    # On an H200, 4096 x 4096: 96 pages of tiles of 64 pages are faster than dense products, 192 of 64 slower.
    taken = sum(board.filled for board in mixture.boards(running, tokens, layer.layout))
    return DENSE if taken > 2 * layer.layout.pages_there else PAGES
