"""Modules that read a child's weight and never call the child: a hook on the child's output would have no effect."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import Any

from torch import nn

#: Methods that set up weights and compute nothing.
_SETUP = re.compile(r"_*(init|reset|tie|load|resize|fuse|unfuse|__init__)")
#: What reads of a weight only what it is like.
_ASKS = r"(?!\.(?:dtype|device|shape|size|ndim|dim|numel|requires_grad|data_ptr|is_meta|element_size)\b)"


def reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` computes with ``child.weight`` itself, as ``nn.MultiheadAttention`` and Mamba's mixers do.

    >>> reads_weight(nn.MultiheadAttention(4, 2), "out_proj"), reads_weight(nn.Sequential(nn.Linear(2, 2)), "0")
    (True, False)
    """
    cls: Any = type(parent)
    return child.isidentifier() and _reads(cls, child)


@lru_cache(maxsize=4096)
def _reads(cls: type, child: str) -> bool:
    use = re.compile(rf"(?<!isinstance\()\bself\.{child}\.weight\b{_ASKS}")
    call = re.compile(rf"\bself\.{child}\(")
    product = re.compile(rf"\bself\.{child}\.weight\s*@|@\s*self\.{child}\.weight\b")
    used = called = multiplied = False
    for owner in cls.__mro__:
        if owner in (nn.Module, object):
            break
        for name, member in vars(owner).items():
            function = inspect.unwrap(member) if inspect.isfunction(member) else None
            if function is None or _SETUP.match(name):
                continue
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            used = used or use.search(source) is not None
            called = called or call.search(source) is not None
            multiplied = multiplied or product.search(source) is not None
    # Where it is called too, kernels are handed the weight on some devices; `Handle.unused` tells when they were.
    return multiplied or (used and not called)
