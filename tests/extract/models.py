"""Pairs of tiny models in folders: a base, and it with something changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from safetensors.numpy import save_file

from lorastack import LoadedLora
from lorastack.core.delta import LoraDelta
from tests.torch.test_experts import mixtral
from tests.torch.tiny import COMMON, GROUPED

MAKE = {
    "llama": lambda **more: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **more)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "mixtral": mixtral,
}
#: Weights with an update, and its kind and shape as (experts, out, in).
WEIGHTS = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": (0, 32, 32),
        "model.layers.1.mlp.down_proj.weight": (0, 32, 48),
    },
    "gpt2": {"transformer.h.0.attn.c_attn.weight": (0, 96, 32), "transformer.h.1.mlp.c_proj.weight": (0, 32, 128)},
    "mixtral": {
        "model.layers.0.self_attn.q_proj.weight": (0, 32, 32),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 96, 32),
        "model.layers.1.mlp.experts.down_proj": (4, 32, 48),
    },
}


def base_of(name: str, folder: Path, **more: object) -> Path:
    """A random model of the family, in a folder."""
    torch.manual_seed(0)
    MAKE[name](**more).save_pretrained(folder, max_shard_size="20KB")
    return folder


def adapter(name: str, rank: int = 3, size: float = 0.1) -> LoadedLora:
    """A random adapter for it; each weight's update is of about the weight's own size."""
    rng = np.random.default_rng(1)
    deltas = {}
    for weight, (experts, out, n_in) in WEIGHTS[name].items():
        many = (experts,) if experts else ()
        a = rng.standard_normal((*many, rank, n_in), np.float32)
        b = size * rng.standard_normal((*many, out, rank)).astype(np.float32)
        deltas[weight] = LoraDelta(a, b, 1.0, "experts" if experts else "linear")
    return LoadedLora.from_tensors(deltas, name="made", naming="hf")


def plain(folder: Path, tensors: Mapping[str, np.ndarray], **config: object) -> Path:
    """A folder with these tensors in one file."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense(delta: LoraDelta) -> np.ndarray:
    return delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))


def far(found: np.ndarray, wanted: np.ndarray) -> float:
    """The relative error in the Frobenius norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
