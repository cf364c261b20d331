"""Latent attention (DeepSeek's): ``kv_b_proj`` in Hugging Face, ``attn_k_b`` and ``attn_v_b`` by head in GGUF.

With ``H`` heads, ``n`` rows of a key without position, ``v`` rows of a value and latent rank ``R``, ``kv_b_proj`` is
``[H * (n + v), R]``, head by head. llama.cpp's converter makes of it ``attn_k_b [H, R, n]``, each head turned over,
and ``attn_v_b [H, v, R]`` (conversion/deepseek.py). Both are exact for low-rank factors, whose A all heads share:

    v: ``B_v A`` stays; k: ``(B_k A)^T = A^T B_k^T``, so that A^T is its B, and B_k^T its A.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lorastack.base.model import BaseModel
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.errors import NamingError, Problems, UnsupportedError
from lorastack.ways import SELECT, ways

#: Architectures of GGUF with latent attention by head.
_SPLIT = frozenset({"deepseek2"})
_WHOLE = re.compile(r".*\blayers\.(\d{1,9})\.self_attn\.kv_b_proj\.weight")
_PART = re.compile(r"blk\.(\d{1,9})\.attn_([kv])_b\.weight")


class Sizes(NamedTuple):
    """How the rows of ``kv_b_proj`` are made up."""

    heads: int
    key: int
    value: int

    @property
    def rows(self) -> int:
        """All of them."""
        return self.heads * (self.key + self.value)


def split(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """An adapter with Hugging Face names, each ``kv_b_proj`` as its GGUF has it; all else stays as it is.

    Raises
    ------
    NamingError
        Listing the weights whose rows are no heads of the base's sizes.
    UnsupportedError
        When one has a magnitude or a bias of its own, which no tensor by head has.
    """
    found = {name: match[1] for name in lora.adapters if (match := _WHOLE.fullmatch(name))}
    if not found or base.architecture.gguf not in _SPLIT:
        return lora
    _refuse_extras(lora, list(found))
    problems = Problems(f"{lora.name} does not fit base {base.name}")
    deltas: dict[str, LoraDelta] = {}
    for name, delta in lora.adapters.items():
        layer = found.get(name)
        if layer is None or f"blk.{layer}.attn_kv_b.weight" in base.shapes:  # as converters before 2025 left it
            deltas[name] = delta
            continue
        sizes = _sizes(base, layer)
        if delta.out_features != sizes.rows:
            problems.add(
                f"weight {name} has {delta.out_features} rows, expected {sizes.heads} heads of {sizes.key} and "
                f"{sizes.value}"
            )
            continue
        deltas[f"blk.{layer}.attn_k_b.weight"] = _key(delta, sizes)
        deltas[f"blk.{layer}.attn_v_b.weight"] = _value(delta, sizes)
    problems.raise_any(NamingError)
    return replace(lora, adapters=MappingProxyType(deltas))


def join(lora: LoadedLora, base: BaseModel) -> LoadedLora:
    """A GGUF adapter, the updates by head as ones of ``kv_b_proj``; their numbers are read for it.

    Raises
    ------
    UnsupportedError
        Listing the weights whose heads share no factor: at a rank of their own each, they are no low-rank update.
    """
    layers = {match[1] for name in lora.adapters if (match := _PART.fullmatch(name))}
    names = {match[1]: name for name in base.shapes if (match := _WHOLE.fullmatch(name))}
    layers &= names.keys()
    if not layers or base.naming != "hf":
        return lora
    problems = Problems(f"{lora.name} cannot be converted")
    deltas: dict[str, LoraDelta] = {}
    for name, delta in lora.adapters.items():
        match = _PART.fullmatch(name)
        if match is None or match[1] not in layers:
            deltas[name] = delta
        elif (whole := names[match[1]]) not in deltas:
            key, value = (lora.get(f"blk.{match[1]}.attn_{part}_b.weight") for part in "kv")
            try:
                deltas[whole] = _joined(key, value, _sizes(base, match[1]))
            except UnsupportedError as error:
                problems.add(f"weight {name}: {error}{ways(SELECT)}")
    problems.raise_any(UnsupportedError)
    return replace(lora, adapters=MappingProxyType(deltas))


def _sizes(base: BaseModel, layer: str) -> Sizes:
    """The sizes as the base's configuration says them, or the shapes of a GGUF."""
    key, value = (base.shapes.get(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
    if key and value:
        return Sizes(key[0], key[2], value[1])
    return Sizes(base.heads, base.number("qk_nope_head_dim"), base.number("v_head_dim"))


def _key(delta: LoraDelta, sizes: Sizes) -> LoraDelta:
    a, b = delta.factors
    heads, key, rank, latent = sizes.heads, sizes.key, delta.rank, delta.in_features
    by_head = _heads(b, sizes, slice(0, key), (heads, rank, key), turned=True)
    return LoraDelta(by_head, _shared(a, heads, (heads, latent, rank), np.transpose), delta.scaling, "experts")


def _value(delta: LoraDelta, sizes: Sizes) -> LoraDelta:
    a, b = delta.factors
    heads, rank = sizes.heads, delta.rank
    by_head = _heads(b, sizes, slice(sizes.key, None), (heads, sizes.value, rank), turned=False)
    return LoraDelta(
        _shared(a, heads, (heads, rank, delta.in_features), lambda x: x), by_head, delta.scaling, "experts"
    )


def _heads(b: Factor, sizes: Sizes, rows: slice, shape: tuple[int, ...], turned: bool) -> Factor:
    """Some rows of each head of a B."""

    def change(array: np.ndarray) -> np.ndarray:
        part = array.reshape(sizes.heads, sizes.key + sizes.value, -1)[:, rows]
        return part.swapaxes(1, 2) if turned else part

    return b.mapped(change, shape)


def _shared(a: Factor, heads: int, shape: tuple[int, ...], turn: Callable[[np.ndarray], np.ndarray]) -> Factor:
    return a.mapped(lambda x: np.broadcast_to(turn(x), (heads, *turn(x).shape)).copy(), shape)


def _joined(key: LoraDelta | None, value: LoraDelta | None, sizes: Sizes) -> LoraDelta:
    """One update of ``kv_b_proj``: at the rank of both where they share their A, else one rank beside the other."""
    parts: list[tuple[np.ndarray, np.ndarray, float, slice]] = []
    if key is not None:
        a = _same_of_all(key.b).T
        parts.append((a, key.a.swapaxes(1, 2), key.scaling, slice(0, sizes.key)))
    if value is not None:
        parts.append((_same_of_all(value.a), value.b, value.scaling, slice(sizes.key, None)))
    one = len(parts) == 1 or (np.array_equal(parts[0][0], parts[1][0]) and parts[0][2] == parts[1][2])
    common = parts[0][2] if len({scaling for _, _, scaling, _ in parts}) == 1 else 1.0
    dtype = np.result_type(*(b.dtype for _, b, _, _ in parts)) if common != 1.0 or one else np.dtype(np.float32)
    rank = parts[0][0].shape[0] if one else sum(a.shape[0] for a, _, _, _ in parts)
    b_all = np.zeros((sizes.heads, sizes.key + sizes.value, rank), dtype)
    start = 0
    for a, b, scaling, rows in parts:
        if b.shape[:2] != b_all[:, rows].shape[:2]:
            raise UnsupportedError(f"its {list(b.shape[:2])} heads and rows are not the base's {tuple(sizes)}")
        b_all[:, rows, start : start + a.shape[0]] = b if scaling == common else b * np.float32(scaling)
        start += 0 if one else a.shape[0]
    a_all = parts[0][0] if one else np.concatenate([a for a, _, _, _ in parts])
    return LoraDelta(np.ascontiguousarray(a_all), b_all.reshape(sizes.rows, rank), common)


def _same_of_all(array: np.ndarray) -> np.ndarray:
    if not (array == array[:1]).all():
        raise UnsupportedError("each head has factors of its own, which are no update of kv_b_proj at this rank")
    return array[0]


def _refuse_extras(lora: LoadedLora, names: list[str]) -> None:
    lost = [f"{kind}: {name}" for kind in ("dora", "lora_bias") for name in names if name in lora.extras.get(kind, {})]
    if lost:
        raise UnsupportedError(f"{lora.name} has extras of weights that GGUF keeps by head{ways(SELECT)}", lost)
