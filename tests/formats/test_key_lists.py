"""Key lists of real kinds of image adapters: each is read, and resolves fully on the full-size model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from lorastack import load
from lorastack.base.fit import misfits
from lorastack.base.settle import settle
from tests.fixtures import make_keys
from tests.formats.images import base_of, full_size

FILES = sorted(make_keys.FOLDER.glob("*.json.gz"))
NAMES = [path.name.removesuffix(".json.gz") for path in FILES]


def sparse(path: Path, keys: dict[str, list[int]]) -> Path:
    """A file with these keys and shapes in float16, and nothing but holes behind its header."""
    header, at = {}, 0
    for key, shape in keys.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_of_file_resolves_fully_on_the_full_size_model(tmp_path: Path, name: str) -> None:
    keys = json.loads(gzip.decompress((make_keys.FOLDER / f"{name}.json.gz").read_bytes()))
    lora = load(sparse(tmp_path / f"{name}.safetensors", keys))
    kind = "wan-i2v" if name.startswith("wan-i2v") else name.partition("-")[0]
    base = base_of(full_size(kind))
    assert misfits(lora, base) == []
    own = settle(lora, base)
    modules = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key} or {
        key.split("_lora.")[0] for key in keys
    }
    fused = sum(3 * ("linear1" in module) + 2 * ("qkv" in module) for module in modules)
    assert len(own.adapters) == len(modules) + fused or "old" in name
    assert own.naming == "hf"
    assert all(weight in base.shapes for weight in own.adapters)


def test_the_lists_are_what_the_rules_give() -> None:
    for name, keys in make_keys.lists().items():
        stored = json.loads(gzip.decompress((make_keys.FOLDER / f"{name}.json.gz").read_bytes()))
        assert stored == {key: list(shape) for key, shape in keys.items()}, (
            f"run python -m tests.fixtures.make_keys: {name}"
        )
    assert set(NAMES) == set(make_keys.lists())
