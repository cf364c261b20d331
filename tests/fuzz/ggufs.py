"""GGUF files taken apart into keys and tensors, one of which is changed, and put together again."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tests.hostile.gguf_bytes import array, header, key, padded, string, tensor

_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_TEXTS = (
    b"",
    b"llama",
    b"gpt2",
    b"adapter",
    b"model",
    b"lora",
    b"\xff",
    b"\x1b[2J",
    b"a" * 1200,
    b"[[adapter]]\nsource=1",
)
_KEYS = (
    b"general.type general.architecture general.alignment general.name adapter.type adapter.lora.alpha lora.alpha "
    b"adapter.lora.task_name adapter.alora.invocation_tokens split.count lorastack.recipe GGUF.version "
    b"llama.block_count llama.attention.head_count llama.attention.head_count_kv tokenizer.ggml.tokens"
).split()
_NAMES = (
    b"token_embd.weight.lora_a", b"token_embd.weight.lora_b", b"output.weight.lora_a", b"blk.0.attn_q.weight.lora_a",
    b"blk.0.attn_q.weight.lora_b", b"rope_freqs.weight.lora_a", b"x_norm.weight", b".lora_a", b"", b"\xff",
    b"\x1b]0;x\x07",
    b"blk.99999999999.attn_q.weight.lora_a", b"a" * 1200,
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 4, 6, 8, 32, 256, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 60, 1 << 63, (1 << 64) - 1)


@dataclass
class _Tensor:
    name: bytes
    dims: list[int]
    kind: int
    offset: int


def changed(data: bytes, rng: random.Random) -> bytes | None:
    """The file with one key or tensor changed; None where it cannot be taken apart."""
    try:
        keys, tensors, start = _parts(data)
    except (struct.error, KeyError, ValueError, IndexError):
        return None
    rest = data[start:]
    if rng.random() < 0.45:
        _change_keys(keys, rng)
    elif tensors:
        rest = _change_tensors(tensors, rest, rng)
    head = header([key(*one) for one in keys], [tensor(t.name, t.dims, t.offset, t.kind) for t in tensors])
    return padded(head) + rest


def _change_keys(keys: list[tuple[bytes, int, bytes]], rng: random.Random) -> None:
    at = rng.randrange(len(keys) + 1)
    which = rng.randrange(5)
    if which == 0 and at < len(keys):
        del keys[at]
    elif which == 1 and at < len(keys):
        keys.append(keys[at])
    elif which == 2 and at < len(keys):
        keys[at] = (rng.choice(_KEYS), *keys[at][1:])
    else:
        name = keys[at][0] if at < len(keys) else rng.choice(_KEYS)
        keys[at : at + 1] = [(name, *_value(rng))]


def _value(rng: random.Random) -> tuple[int, bytes]:
    """A value of any type, as it is stored."""
    kind = rng.choice((*_SIZE, 6, 8, 8, 9, 9, 13))
    if kind == _STRING:
        return kind, string(rng.choice(_TEXTS))
    if kind == _ARRAY:
        inner, length = rng.choice((*_SIZE, 8, 9)), rng.choice((0, 1, 2, 5))
        size = _SIZE.get(inner, 8)
        said = rng.choice((length, length, length, 1 << 40, (1 << 61) + 1))
        return kind, array(inner, said, string(b"x") * length if inner == _STRING else rng.randbytes(size * length))
    size = _SIZE.get(kind, 4)
    telling = rng.choice((rng.choice(_NUMBERS) % (1 << 8 * size), int.from_bytes(struct.pack("<f", 8.0), "little")))
    return kind, (telling % (1 << 8 * size)).to_bytes(size, "little")


def _change_tensors(tensors: list[_Tensor], rest: bytes, rng: random.Random) -> bytes:
    one = rng.choice(tensors)
    which = rng.randrange(9)
    if which == 0:
        one.name = rng.choice((*_NAMES, rng.choice(tensors).name, one.name[:-1] + b"a"))
    elif which == 1:
        one.kind = rng.choice((0, 1, 2, 8, 12, 16, 24, 27, 28, 30, 31, 39, 99))
    elif which == 2:
        one.offset = rng.choice((*_NUMBERS, one.offset + 32, one.offset ^ 1))
    elif which == 3 and one.dims:
        one.dims[rng.randrange(len(one.dims))] = rng.choice(_NUMBERS)
    elif which == 4:
        one.dims = rng.choice((one.dims[::-1], one.dims[:-1], [*one.dims, 1], [1, *one.dims], [], [0] * 4))
    elif which == 5:
        tensors.append(_Tensor(rng.choice((one.name, *_NAMES)), list(one.dims), one.kind, one.offset))
    elif which == 6:
        tensors.remove(one)
    else:  # its own place, with numbers of the whole range: a sound file still
        dims = [rng.choice((1, 2, 3, 4, 32)) for _ in range(rng.choice((1, 2, 2, 3)))]
        one.dims, one.kind, one.offset = dims, rng.choice((0, 1, 30)), -(-len(rest) // 32) * 32
        size = 4 * dims[0] * (dims[1] if len(dims) > 1 else 1) * (dims[2] if len(dims) > 2 else 1)
        rest = rest.ljust(one.offset, b"\0") + rng.randbytes(size)
    return rest


def _parts(data: bytes) -> tuple[list[tuple[bytes, int, bytes]], list[_Tensor], int]:
    """Keys with their types and stored values, tensors, and where the data begins."""
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if not data.startswith(b"GGUF") or version != 3 or max(tensor_count, key_count) > 1000:
        raise ValueError
    at = 24

    def take(codes: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + codes, data, at)
        at += struct.calcsize("<" + codes)
        return int(value)

    def text() -> bytes:
        nonlocal at
        length = take("Q")
        if length > len(data):
            raise ValueError
        at += length
        return data[at - length : at]

    keys = []
    for _ in range(key_count):
        name, kind = text(), take("I")
        start = at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            inner, length = take("I"), take("Q")
            if length > len(data):
                raise ValueError
            if inner == _STRING:
                for _ in range(length):
                    text()
            else:
                at += length * _SIZE[inner]
        else:
            at += _SIZE[kind]
        keys.append((name, kind, data[start:at]))
    tensors = []
    for _ in range(tensor_count):
        name, count = text(), take("I")
        if count > 8:
            raise ValueError
        tensors.append(_Tensor(name, [take("Q") for _ in range(count)], take("I"), take("Q")))
    return keys, tensors, -(-at // 32) * 32
