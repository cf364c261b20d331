"""The demo's model and adapters with wider heads, exactly the same function: vLLM's CPU attention takes none so small.

New rows of q, k and v, and the columns of o that read them, are zeros; old ones lie where the rotary embedding turns
them by the same angle as before. Attention divides by the root of the head's width, so q is multiplied by what that
grew: by 2 at four times the width, which rounds nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FACTOR = 4


def _rows(array: np.ndarray, width: int, times: float = 1.0) -> np.ndarray:
    """``[heads * width, n]`` -> ``[heads * FACTOR * width, n]``."""
    half, heads = width // 2, array.shape[0] // width
    # Pair i of a head of width w turns by base ** (-2i / w): pair FACTOR * i of the wide one turns alike.
    at = [FACTOR * i for i in range(half)] + [FACTOR * half + FACTOR * i for i in range(half)]
    wide = np.zeros((heads, FACTOR * width, array.shape[1]), array.dtype)
    wide[:, at] = array.reshape(heads, width, -1) * array.dtype.type(times)
    return wide.reshape(heads * FACTOR * width, -1)


def _padded(name: str, array: np.ndarray, width: int) -> np.ndarray:
    reads, writes = name.endswith(("proj.weight", "lora_A.weight")), name.endswith(("proj.weight", "lora_B.weight"))
    if writes and ".q_proj." in name:
        return _rows(array, width, math.sqrt(FACTOR))
    if writes and (".k_proj." in name or ".v_proj." in name):
        return _rows(array, width)
    if reads and ".o_proj." in name:
        return np.ascontiguousarray(_rows(np.ascontiguousarray(array.T), width).T)
    return array


def pad_base(source: Path, out: Path) -> Path:
    """The model, its heads four times as wide."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    width = config["head_dim"]
    tensors = {name: _padded(name, array, width) for name, array in load_file(source / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"head_dim": FACTOR * width}))
    return out


def pad_adapter(source: Path, out: Path, width: int = 16) -> Path:
    """A PEFT folder for it."""
    shutil.copytree(source, out)
    weights = "adapter_model.safetensors"
    tensors = {name: _padded(name, array, width) for name, array in load_file(source / weights).items()}
    save_file(tensors, out / weights, metadata={"format": "pt"})
    return out
