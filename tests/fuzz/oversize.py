"""Inputs of the corpus that are too large to keep as files: made anew each time."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.fuzz.peers import PREFIX
from tests.fuzz.seeds import pickle_archive
from tests.hostile.gguf_bytes import header, padded, tensor


def _header_of(item: bytes, count: int) -> bytes:
    """A safetensors file whose header is a list of many such items."""
    head = b'{"x":[' + item * count + item[:-1] + b"]}"
    return len(head).to_bytes(8, "little") + head


def _keys_of_one_hash() -> bytes:
    """A pickled dict whose keys Python would look for in one and the same place."""
    numbers = (b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(1, 60_001))
    return pickle_archive(b"\x80\x02}(" + b"".join(numbers) + b"u.")


def _patterns(field: str, pattern: str, count: int) -> bytes:
    """A configuration with many patterns, each with a number in it."""
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, field: {pattern % n: 4 for n in range(1, count + 1)}}
    return json.dumps(said).encode()


def _doubling_recipes() -> bytes:
    """Thirty recipes that each include the next one twice."""
    parts = [f"#@ r{n}.toml\n" + f'[[adapter]]\nsource = "r{n + 1}.toml"\n' * 2 for n in range(30)]
    return ("".join(parts) + '#@ r30.toml\n[[adapter]]\nsource = "x"\n').removeprefix("#@ r0.toml\n").encode()


def _chain_of_recipes() -> bytes:
    """Twelve hundred recipes, each within the one before."""
    parts = [f'#@ c{n}.toml\n[[adapter]]\nsource = "c{n + 1}.toml"\n' for n in range(1200)]
    return "".join(parts).removeprefix("#@ c0.toml\n").encode()


#: (target, name) -> the input.
MADE: dict[tuple[str, str], Callable[[], bytes]] = {
    ("gguf", "40000 tensors"): lambda: padded(
        header(tensors=[tensor(f"{n:x}.weight.lora_a", [0], 0) for n in range(40_000)])),
    ("gguf", "4000 keys"): lambda: padded(header(keys=[b"\x01" + bytes(7) + b"a" + bytes(4) + b"1"] * 4000)),
    ("safetensors", "objects without end"): lambda: _header_of(b"{},", 3_000_000),
    ("safetensors", "small objects without end"): lambda: _header_of(b'{"":0},', 1_000_000),
    ("safetensors", "deep"): lambda: _header_of(b"[" * 200_000 + b",", 1),
    ("config", "objects without end"): lambda: b'{"peft_type":"LORA","auto_mapping":[' + b"{}," * 3_000_000 + b"{}]}",
    ("config", "20000 plain patterns"): lambda: _patterns("rank_pattern", "z%d", 20_000),
    ("config", "20000 slow patterns"): lambda: _patterns("alpha_pattern", "[a-z\u0100-\uffff]{1,%d}", 20_000),
    ("pickled", "keys of one hash"): _keys_of_one_hash,
    ("keys", "180000 letters"): lambda: f"{PREFIX}{'layers.0.' * 20_000}z.lora_A.weight".encode(),
    ("recipe", "doubling"): _doubling_recipes,
    ("recipe", "a chain"): _chain_of_recipes,
    ("recipe", "100000 brackets"): lambda: b"a=" + b"[" * 100_000,
    ("recipe", "30000 parts of a key"): lambda: b"a" + b".a" * 30_000 + b"=1",
    ("recipe", "20000 groups"): lambda: b'[[adapter]]\nsource="x"\nselect="re:' + b"(" * 20_000 + b")" * 20_000 + b'"',
    ("patterns", "a name of 100000 letters"): lambda: b"(a|b)*c\n" + b"ab" * 50_000,
    ("mixture", "100000 letters"): lambda: b"a" * 100_000 + b":1",
}  # fmt: skip
