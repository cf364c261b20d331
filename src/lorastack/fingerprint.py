"""Fingerprints: one word for the content of a stack's adapters, its scales and the way they become one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError
from lorastack.formats.provenance import hashes, leaves
from lorastack.ways import Way, ways


def fingerprint(stack: LoraStack, how: Mapping[str, Any]) -> str:
    """See `LoraStack.fingerprint`."""
    if stack.adapters:
        raise ArgumentError(
            f"{len(stack.adapters)} adapters are known by (target module, layer) only, and have no content to tell "
            "them by" + ways(Way("push them by weight name with push()", None))
        )
    parts = [(_content(part), part.history, own) for lora, scale in stack.entries for part, own in leaves(lora, scale)]
    return fingerprint_of(parts, how)


def fingerprint_of(parts: Iterable[tuple[Mapping[str, str], Sequence[Any], float]], how: Mapping[str, Any]) -> str:
    """Of each adapter's hashes by file, the steps that changed it and its scale, in order; 64 hexadecimal digits.

    >>> parts = [({"zara.gguf": "9f"}, (), 0.7)]
    >>> fingerprint_of(parts, {}) == fingerprint_of([({"other.gguf": "9f"}, (), 0.7)], {})
    True
    >>> fingerprint_of(parts, {}) == fingerprint_of(parts, {"rank": 8})
    False
    """
    # A file says the same under any name; two files of an adapter are told apart by what they hold.
    said = [[sorted(sums.values()), [list(step) for step in steps], repr(scale)] for sums, steps, scale in parts]
    raw = orjson.dumps([said, dict(how)], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=_plain)
    return hashlib.sha256(raw).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no word for: a mapping that is no dict, a path."""
    return dict(value) if isinstance(value, Mapping) else str(value)


def _content(lora: LoadedLora) -> Mapping[str, str]:
    """The hashes of its files; of one made in memory, that of its numbers."""
    return hashes(lora) or {"memory": _of_numbers(lora)}


def _of_numbers(lora: LoadedLora) -> str:
    total = hashlib.sha256(f"{lora.naming} {lora.file_alpha!r}".encode())
    for name, delta in lora.adapters.items():
        _add(total, name)
        _add(total, delta)
    _add(total, lora.extras)
    _add(total, lora.made)
    return total.hexdigest()


def _add(total: Any, value: Any) -> None:
    if isinstance(value, LoraDelta):
        _add(total, f"{value.kind} {value.scaling!r}")
        for factor in value.factors:
            _add(total, factor)
    elif isinstance(value, Factor):
        _add(total, value.take())
    elif isinstance(value, np.ndarray):
        total.update(f"\0{value.dtype} {value.shape} ".encode())
        total.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _add(total, key)
            _add(total, one)
    else:
        total.update(f"\0{value!r}".encode())
