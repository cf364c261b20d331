"""JSON texts, and the headers of safetensors files, with one thing changed: fields, values, keys twice, depth."""

from __future__ import annotations

import json
import math
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -1e-320, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 1 << 70, 10**400,
    "", "x",
    "q_proj", "\x1b[2J", "\u202ex", "a" * 2000, [], {}, [[]], [0], [-1], ["x"], [1 << 40], {"x": 1}, {"q_proj": 2},
    {"": 3}, {".*": 2}, {"k_proj|q_proj": 3}, {"(a+)+b": 2}, {"(?=k)k_proj": 3}, "float32", "F32", "F16", "BF16", "F64",
    "F8_E4M3", "BOOL", "I8", [1, 2, 3, 4], [0, 1 << 62],
)  # fmt: skip
_FIELDS = (
    "peft_type r lora_alpha use_rslora use_dora rank_pattern alpha_pattern target_parameters fan_in_fan_out bias "
    "lora_bias modules_to_save trainable_token_indices alora_invocation_tokens init_lora_weights "
    "base_model_name_or_path revision task_type auto_mapping layers_to_transform enable_lora layer_replication "
    "__metadata__ weight_map architectures "
    "model_type num_hidden_layers num_attention_heads num_key_value_heads text_config quantization_config dtype shape "
    "data_offsets lorastack.recipe lorastack.notes n_layer tie_word_embeddings"
).split()
_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I8": 1, "BOOL": 1}
_TWICE = "\x00twice\x00"


def changed(data: bytes, rng: random.Random) -> bytes | None:
    """The JSON text with one thing changed; None where it is none."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return None
    try:
        text = _changed(root, rng)
    except (ValueError, RecursionError):  # what is as deep or as long as it takes cannot be written again
        return None
    return None if text is None else text.encode("utf-8", "surrogatepass")


def header_changed(data: bytes, rng: random.Random) -> bytes | None:
    """The same of a safetensors file's header; half of the time offsets and data are made to fit what it says."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return None
    head, rest = data[8 : 8 + length], data[8 + length :]
    new = changed(head, rng)
    if new is None:
        return None
    if rng.random() < 0.5:
        new, rest = _fitted(new, rest)
    return len(new).to_bytes(8, "little") + new + rest


def _fitted(head: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """Offsets one behind the other, and as much data as they say, where shapes and types have a meaning."""
    try:
        root = json.loads(head)
        at = 0
        for name, entry in root.items():
            if name != "__metadata__":
                if max(entry["shape"], default=1) > 1 << 16:
                    return head, rest
                size = math.prod(entry["shape"]) * _ITEM[entry["dtype"]]
                entry["data_offsets"] = [at, at + size]
                at += size
        if not 0 <= at <= 1 << 16:
            return head, rest
        return json.dumps(root).encode(), (rest + bytes(range(1, 64)) * (1 + at // 63))[:at]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return head, rest


def _changed(root: Any, rng: random.Random) -> str | None:
    holders = _holders(root)
    if not holders:
        return json.dumps(rng.choice(_ODD))
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys) if keys else None
    which = rng.randrange(9)
    if which == 0 or key is None:
        if isinstance(holder, dict):
            holder[rng.choice(_FIELDS)] = rng.choice(_ODD)
        else:
            holder.append(rng.choice(_ODD))
    elif which == 1:
        del holder[key]
    elif which == 2 and isinstance(holder, dict):
        holder[rng.choice((*_FIELDS, f"{key}x", f"x.{key}", key[1:], key.replace("A", "B")))] = holder.pop(key)
    elif which == 3 and isinstance(holder, dict):
        holder[key + _TWICE] = rng.choice((rng.choice(_ODD), holder[key]))
    elif which == 4:
        depth, mark = rng.choice((1, 30, 1500)), "\x00deep\x00"
        value, holder[key] = json.dumps(holder[key]), mark
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        return json.dumps(root).replace(json.dumps(mark), opening * depth + value + closing * depth)
    elif which == 5:
        other = rng.choice(holders)
        values = list(other.values()) if isinstance(other, dict) else other
        if values:
            holder[key] = json.loads(json.dumps(rng.choice(values)))
    elif which == 6 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((-1, 1, 8, 1 << 32))
    else:
        holder[key] = rng.choice(_ODD)
    if rng.random() < 0.05:
        return json.dumps(root, indent=rng.choice((1, 4))).replace(_json(_TWICE), "")
    return json.dumps(root, ensure_ascii=rng.random() < 0.5).replace(_json(_TWICE), "")


def _json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _holders(root: Any) -> list[Any]:
    """Every object and list, from the outermost on."""
    found, left = [], [root]
    while left and len(found) < 1000:
        one = left.pop()
        if isinstance(one, (dict, list)):
            found.append(one)
            left += list(one.values()) if isinstance(one, dict) else one
    return found
