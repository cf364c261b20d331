"""NumPy arrays of adapters as torch tensors, sharing memory where types and device allow it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from lorastack.core.factor import Factor

with warnings.catch_warnings():
    # Torch warns once that a read-only array could be written to through its tensor; nothing here writes to one.
    warnings.simplefilter("ignore")
    _frozen = np.zeros(1, np.float32)
    _frozen.flags.writeable = False
    torch.from_numpy(_frozen)


def as_looked_up(embedding: Any, rows: torch.Tensor) -> torch.Tensor:
    """Rows as ``embedding`` gives its own: some models' (Gemma's, BART's) are scaled when they are looked up."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)


def to_torch(factor: Factor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The factor's numbers in ``dtype`` on ``device``; sharing its memory, never a file's, when nothing has to change.

    Raises
    ------
    NonFiniteError
        On NaN or Inf, unless the adapter was loaded with ``allow_nonfinite``.
    """
    array = factor.take()
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        tensor = torch.from_numpy(array)
    elif array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.astype(np.float32))
    return tensor.to(device=device, dtype=dtype)
