"""Adapters that change nothing, scales that no type holds, caches with a damaged byte: a value or an error of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load, save
from lorastack.algebra.compare import compare
from lorastack.algebra.intruders import _read
from lorastack.errors import ArgumentError, FormatError

METHODS = [f"{rule}@{space}" for rule in ("ties", "magnitude_prune", "dare") for space in ("dense", "knots", "core")]


def lora(name: str, b: float = 1.0) -> LoadedLora:
    return LoadedLora.from_tensors({"w": (np.ones((2, 6), np.float32), np.full((5, 2), b, np.float32))}, name=name)


@pytest.mark.parametrize("method", METHODS)
def test_untrained_adapters_make_nothing(method: str) -> None:
    for stack in ([(lora("a", 0), 1.0), (lora("b", 0), 1.0)], [(lora("a"), 0.0), (lora("b"), 0.0)]):
        baked = LoraStack(stack).bake(method=method)
        np.testing.assert_array_equal(baked.adapters["w"].dense(), np.zeros((5, 6)))


@pytest.mark.parametrize("method", ["magnitude_prune@knots", "magnitude_prune@core", "ties@knots"])
def test_an_untrained_adapter_takes_nothing_from_another(method: str) -> None:
    both = LoraStack([(lora("a"), 1.0), (lora("b", 0), 1.0)]).bake(method=method, density=0.9)
    np.testing.assert_allclose(both.adapters["w"].dense(), np.full((5, 6), 2.0), rtol=1e-5)


@pytest.mark.parametrize("method", ["cat", "linear", *METHODS])
@pytest.mark.parametrize("scale", [1e39, 1e154, 1e200, 1e308])
def test_scales_that_float32_does_not_hold(method: str, scale: float) -> None:
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        LoraStack([(lora("f"), scale), (lora("g"), scale)]).bake(method=method)
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        compare(LoraStack([(lora("f"), scale), (lora("g"), 1.0)]))
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        LoraStack([(lora("f"), scale)]).apply("w", np.ones(6, np.float32), 5)


@pytest.mark.parametrize("method", ["linear", "ties@dense", "ties@knots", "ties@core"])
def test_sums_that_float32_does_not_hold(method: str) -> None:
    with pytest.raises(ArgumentError, match="more than float32 holds"):
        LoraStack([(lora("f", 3e38), 3e38), (lora("g"), 1.0)]).bake(method=method)


def test_the_largest_alpha_is_written(tmp_path: Path) -> None:
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    one = LoadedLora.from_tensors({"model.layers.0.mlp.up_proj.weight": pair}, naming="hf")
    for scale in (1e15, 1e20, 1e38):
        again = load(save(LoraStack([(one, scale)]).bake(), tmp_path / f"{scale:g}"))
        assert again.adapters["model.layers.0.mlp.up_proj.weight"].scaling == pytest.approx(scale, rel=1e-12)
    with pytest.raises(FormatError, match=r"its alpha would be .*, which float32 cannot hold"):
        save(one.scaled(3e38), tmp_path / "too-large")


def test_a_cache_with_any_damaged_byte_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, u=np.eye(4), sigma=np.ones(4))
    whole = path.read_bytes()
    assert _read(path) is not None
    for at in range(0, len(whole), 3):
        for flipped in (0x01, 0x63, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flipped]) + whole[at + 1 :])
            found = _read(path)
            assert found is None or found.u.shape == (4, len(found.sigma))
    for size in range(0, len(whole), 50):
        path.write_bytes(whole[:size])
        assert _read(path) is None
    np.savez(path, u=np.eye(4), sigma=np.ones(3))
    assert _read(path) is None
