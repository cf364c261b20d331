"""GGUF files as bytes, part by part, so that each part can lie."""

from __future__ import annotations

import struct

import numpy as np

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 1, 4, 6, 7, 8, 9, 10, 12
W = "blk.0.attn_q.weight"
A, B = np.arange(24, dtype="<f4").reshape(4, 6), np.arange(20, dtype="<f4").reshape(5, 4)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + content


def tensor(name: str | bytes, dims: list[int], offset: int, kind: int = 0, count: int | None = None) -> bytes:
    head = string(name) + struct.pack("<I", len(dims) if count is None else count)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


SOUND_KEYS = [
    key("general.architecture", STRING, string("llama")),
    key("general.type", STRING, string("adapter")),
    key("adapter.type", STRING, string("lora")),
    key("adapter.lora.alpha", F32, struct.pack("<f", 8)),
]
SOUND_TENSORS = [tensor(f"{W}.lora_a", [6, 4], 0), tensor(f"{W}.lora_b", [4, 5], 96)]
DATA = A.tobytes() + B.tobytes()


def header(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    key_count: int | None = None,
    tensor_count: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    keys = SOUND_KEYS if keys is None else keys
    tensors = SOUND_TENSORS if tensors is None else tensors
    counts = [len(t) if n is None else n for t, n in ((tensors, tensor_count), (keys, key_count))]
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)


def padded(head: bytes, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment)
