"""Stacks for the tests' random llama, without torch: programs that are started for a test load in no time."""

from __future__ import annotations

import numpy as np

from lorastack import LoadedLora, LoraStack

Q = "model.layers.0.self_attn.q_proj.weight"


def adapters(count: int = 2, size: float = 0.05) -> LoraStack:
    found = LoraStack()
    for n in range(count):
        rng = np.random.default_rng(n)
        names = [Q, "model.layers.1.mlp.down_proj.weight"]
        shapes = {names[0]: (32, 32), names[1]: (32, 48)}
        factors = {
            name: (
                rng.standard_normal((3, n_in), np.float32),
                size * rng.standard_normal((n_out, 3)).astype(np.float32),
            )
            for name, (n_out, n_in) in shapes.items()
        }
        found.push(LoadedLora.from_tensors(factors, alpha=6, name=f"a{n}", naming="hf"), 0.7 - 0.4 * n)
    return found
