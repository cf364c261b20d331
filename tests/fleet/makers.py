"""A small library beside the demo's base, and what a mixture of it is, written densely."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorastack import LoadedLora

WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.layers.1.mlp.up_proj.weight": (176, 64)}


def adapter(seed: int, rank: int = 4, alpha: float = 8.0, weights: int = 2) -> LoadedLora:
    """One with factors of its own for the demo's base."""
    rng = np.random.default_rng(seed)
    pairs = {
        name: (rng.standard_normal((rank, width), np.float32), rng.standard_normal((out, rank), np.float32))
        for name, (out, width) in list(WEIGHTS.items())[:weights]
    }
    return LoadedLora.from_tensors(pairs, alpha=alpha, name=f"a{seed}", naming="hf")


def library(folder: Path, count: int = 3, rank: int = 4) -> Path:
    """``count`` PEFT folders a0, a1, ..."""
    folder.mkdir()
    for seed in range(count):
        adapter(seed, rank).save(folder / f"a{seed}")
    return folder


def dense(folder: Path, name: str) -> np.ndarray:
    """The update in a PEFT folder in float64, by PEFT's own formula from the raw tensors; zeros where it has none."""
    import json

    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    module = name.removesuffix(".weight")
    a = tensors.get(f"base_model.model.{module}.lora_A.weight")
    b = tensors.get(f"base_model.model.{module}.lora_B.weight")
    if a is None or b is None:
        return np.zeros(WEIGHTS[name])
    assert config["rank_pattern"] == {}
    assert config["alpha_pattern"] == {}
    return config["lora_alpha"] / config["r"] * (b.astype(np.float64) @ a.astype(np.float64))
