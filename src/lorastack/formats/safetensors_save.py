"""Write a safetensors file tensor by tensor.

The ``safetensors`` package takes all tensors in memory at once; an adapter is written with no more
than three weights in memory: one that is written, and two that are computed meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import orjson

from lorastack.core import dtypes
from lorastack.core.factor import Factor
from lorastack.errors import Failures, FormatError
from lorastack.files.large import LargeFile
from lorastack.pipeline import ahead

STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_ITEM = {"f32": 4, "f16": 2, "bf16": 2}

#: name, shape, "f32" | "f16" | "bf16", and what computes the array
Entry = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]


def kept(factor: Factor) -> str:
    """The type a factor is written in when none is asked for; safetensors has no q8_0."""
    kind = dtypes.short_name(factor.stored)
    return "f32" if kind == "q8_0" else kind


def write_safetensors(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``entries`` in order; each array is computed when its turn comes.

    Raises
    ------
    FormatError
        When two entries have one name.
    """
    # Larger items first keeps every tensor aligned, as the package itself orders them.
    ordered = sorted(entries, key=lambda entry: -_ITEM[entry[2]])
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, shape, kind, _ in ordered:
        if name in header:
            raise FormatError(f"{path.name} cannot be written: it would have two tensors {name}")
        size = math.prod(shape) * _ITEM[kind]
        header[name] = {"dtype": STORED[kind], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = orjson.dumps(header)
    raw += b" " * (-len(raw) % 8)
    failures = Failures(f"{path.name} cannot be written")
    with LargeFile(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for computed in ahead((partial(failures.get, compute) for _, _, _, compute in ordered), workers=1):
            if computed is None or failures:
                continue  # nothing will be kept; the rest is only looked at, to say all that is wrong
            array = np.ascontiguousarray(computed)
            file.write(array.view(np.uint8).reshape(-1))
            if progress:
                progress(array.nbytes)
    failures.raise_any()
