"""Mutator: other bytes made of an input's, most of them by a change that its form understands.

Damage to bytes alone is refused at the first length that does not fit. So an input is also taken apart, one part of it
changed, and put together again with lengths, offsets and checksums that are right.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence

from tests.fuzz import archives, ggufs, jsons

#: Bytes that mean something where they land: lengths, counts, types, JSON, TOML, patterns, terminals.
TELLING = [
    *(n.to_bytes(8, "little") for n in (0, 1, 2, 1 << 31, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
    *(n.to_bytes(4, "little") for n in (0, 1, 8, 9, 13, 31, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)),
    *(struct.pack("<f", x) for x in (0.0, -0.0, 1e-45, 3e38, float("inf"), float("nan"), 65520.0)),
    *b'[ ] { } " , : 0 - . 1e999 null true NaN \\u0061 \\u0022 \\ud800 # = : @ / ~ .. ../ * ? + | ( ) ^ $ \\'.split(),
    *(
        b"\x00",
        b"\xff",
        b"\n",
        b"\r",
        b"\t",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xc2\x9b",
    ),
]
#: Texts that readers know.
WORDS = (
    "base_model.model. .lora_A.weight .lora_B.weight .lora_A.default.weight lora_embedding_A lora_magnitude_vector "
    "token_adapter.trainable_tokens_delta modules_to_save .base_layer. original_module _orig_mod. module. "
    "_fsdp_wrapped_module. .weight .bias [[adapter]] source= scale= name= select= scales= steps= names= rename= "
    "sha256= base= without_extras= 'x' 'y.gguf' 'in.toml' x:0.7 y.gguf:-1 in.toml:2 1e308 -1 inf nan 0x10 1_0 "
    "2024-01-01 re: (a+)+b (?:a|a)* (?=a) (?<!a) (?i) \\1 \\b \\d{1,9} a{e<=1} [[:alpha:]] [^a] [a-\\d] [!x] "
    "blk.0.attn_q.weight owner/name @main @refs/pr/1 ~root /proc/self/mem /dev/zero C:\\x layers.0. " + "9" * 5000
).split()
Rng = random.Random


def mutated(data: bytes, others: Sequence[bytes], form: str, rng: Rng, longest: int = 1 << 16) -> bytes:
    """``data`` after one to three changes; ``others`` are inputs to take pieces of."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        known = rng.random() < 0.7
        change = _BY_FORM.get(form) if known else None
        data = (change and change(data, rng)) or rng.choice(_PLAIN)(data, others, rng)
    return data[:longest]


def _flip(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    return _over(data, rng, lambda old: bytes([old[0] ^ 1 << rng.randrange(8)]), 1)


def _edge(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    """A whole number at an even place becomes a near one, or one at an edge."""
    size = rng.choice((1, 2, 4, 8))
    step = rng.choice((-1, 1, 7, -8, 1 << (8 * size - 1), -(1 << (8 * size - 1)), 0x7F << (8 * size - 8)))

    def moved(old: bytes) -> bytes:
        return ((int.from_bytes(old, "little") + step) % (1 << 8 * size)).to_bytes(size, "little")

    return _over(data, rng, moved, size)


def _over(data: bytes, rng: Rng, change: Callable[[bytes], bytes], size: int) -> bytes:
    if len(data) < size:
        return data
    at = rng.randrange(len(data) - size + 1) // size * size
    return data[:at] + change(data[at : at + size]) + data[at + size :]


def _insert(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = _piece(rng)
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def _piece(rng: Rng) -> bytes:
    which = rng.randrange(4)
    if which == 0:
        return rng.randbytes(rng.randrange(1, 9))
    if which == 1:
        return rng.choice(WORDS).encode()
    return rng.choice(TELLING)


def _delete(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
    return data[:start] + data[start + size :]


def _truncate(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, _: Sequence[bytes], rng: Rng) -> bytes:
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 32, 200))
    return data[:start] + data[start : start + size] * rng.choice((2, 2, 3, 40)) + data[start + size :]


def _splice(data: bytes, others: Sequence[bytes], rng: Rng) -> bytes:
    other = rng.choice(others) if others else data
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_PLAIN = (_flip, _edge, _insert, _insert, _delete, _truncate, _repeat, _splice)


def _text(data: bytes, rng: Rng) -> bytes:
    """Change a line, or a word of one."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    which = rng.randrange(6)
    if which == 0:
        lines.insert(at, rng.choice(lines))
    elif which == 1:
        del lines[at]
    elif which == 2:
        lines[at] += rng.choice(WORDS).encode()
    elif which == 3:
        depth = rng.choice((2, 30, 1000))
        opening, closing = rng.choice(((b"(", b")"), (b"[", b"]"), (b"a.", b""), (b"{a=", b"}"), (b"(?:", b")*")))
        lines[at] = opening * depth + lines[at] + closing * depth
    else:
        words = re.split(rb"(\W+)", lines[at])
        words[rng.randrange(len(words))] = rng.choice((rng.choice(WORDS).encode(), rng.choice(TELLING)))
        lines[at] = b"".join(words)
    return b"\n".join(lines)


def _choices(data: bytes, rng: Rng) -> bytes:
    """Another choice, or other ones from here on."""
    at = rng.randrange(64)
    data = data.ljust(at + 1, b"\0")
    end = at + rng.choice((1, 1, 4, 64))
    return data[:at] + rng.randbytes(end - at) + data[end:]


_BY_FORM: dict[str, Callable[[bytes, Rng], bytes | None]] = {
    "json": jsons.changed,
    "safetensors": jsons.header_changed,
    "gguf": ggufs.changed,
    "archive": archives.changed,
    "text": _text,
    "choices": _choices,
}
