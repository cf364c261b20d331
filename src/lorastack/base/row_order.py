"""How the output rows of a weight move between Hugging Face and GGUF, by the rule of its architecture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorastack.base.model import BaseModel
from lorastack.core.target import Naming

Permute = Callable[[np.ndarray], np.ndarray]


def row_order(base: BaseModel, gguf_name: str, to: Naming) -> Permute | None:
    """How the output rows of that weight move when converted to ``to``; None when they stay.

    The function takes an array whose first axis is the output (lora_B, a bias, a magnitude).
    """
    rule, stem = base.architecture.rows, _stem(gguf_name)
    if rule == "rotary" and stem in ("attn_q", "attn_k"):
        count = base.heads if stem == "attn_q" else base.kv_heads
        return _swap(count, 2, -1) if to == "gguf" else _swap(count, -1, 2)
    if rule == "fused" and stem == "attn_qkv":
        return _swap_outer(base.heads, 3) if to == "gguf" else _swap_outer(3, base.heads)
    if rule == "groups" and stem == "attn_qkv":
        return _groups(base.heads, base.kv_heads, to)
    return None


def rows_misfit(base: BaseModel, gguf_name: str, rows: int) -> str | None:
    """Why the rows of that weight cannot be moved; None where they can, or stay."""
    rule, stem = base.architecture.rows, _stem(gguf_name)
    if rule == "rotary" and stem in ("attn_q", "attn_k"):
        count, parts, what = base.heads if stem == "attn_q" else base.kv_heads, 2, "heads of two halves"
    elif rule == "fused" and stem == "attn_qkv":
        count, parts, what = base.heads, 3, "heads of three parts"
    elif rule == "groups" and stem == "attn_qkv":
        count, parts, what = base.heads + 2 * base.kv_heads, 1, f"heads, keys and values in {base.kv_heads} groups"
        if base.heads % base.kv_heads:
            return f"its {base.heads} heads are no {base.kv_heads} groups of equal size"
    else:
        return None
    return f"its {rows} rows are no {count} {what}" if rows % (count * parts) else None


def _stem(gguf_name: str) -> str:
    return gguf_name.removesuffix(".weight").rpartition(".")[2]


def _swap(heads: int, first: int, second: int) -> Permute:
    """``[heads, first, second, ...] -> [heads, second, first, ...]``; -1 is what is left."""

    def permute(array: np.ndarray) -> np.ndarray:
        rest = array.shape[1:]
        size = array.shape[0] // heads // 2
        one, two = (first, size) if first == 2 else (size, second)
        return array.reshape(heads, one, two, *rest).swapaxes(1, 2).reshape(array.shape)

    return permute


def _swap_outer(first: int, second: int) -> Permute:
    """``[first, second, d, ...] -> [second, first, d, ...]``."""

    def permute(array: np.ndarray) -> np.ndarray:
        return array.reshape(first, second, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return permute


def _groups(heads: int, groups: int, to: Naming) -> Permute:
    """Falcon's fused qkv: ``[group, (q ..., k, v)]`` in Hugging Face, all q, all k, all v in GGUF."""
    each = heads // groups
    by_group = np.arange(heads + 2 * groups).reshape(groups, each + 2)
    by_part = np.concatenate([by_group[:, :each].reshape(-1), by_group[:, each], by_group[:, each + 1]])
    order = by_part if to == "gguf" else np.argsort(by_part)

    def permute(array: np.ndarray) -> np.ndarray:
        return array.reshape(order.size, -1, *array.shape[1:])[order].reshape(array.shape)

    return permute
