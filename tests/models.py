"""Real transformers models with a stack's NumPy sums added to their linear layers, for tests only.

This is the plain definition of applying a stack, written apart from ``lorastack.torch``: a forward hook
adds ``stack.apply`` to the output of each linear layer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lorastack import LoraStack


def load_model(base: Path) -> torch.nn.Module:
    """A float32 model from a Hugging Face folder or a GGUF file."""
    if base.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def to_hf_rows(y: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's rows of q and k, rotary pairs interleaved, in Hugging Face's order."""
    lead, rows = y.shape[:-1], y.shape[-1]
    return y.reshape(*lead, heads, rows // heads // 2, 2).swapaxes(-1, -2).reshape(*lead, rows)


@contextlib.contextmanager
def numpy_stack(model: torch.nn.Module, stack: LoraStack) -> Iterator[None]:
    """Add the stack's sums to the model's linear layers while the context is open."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    used: set[str] = set()
    handles = []

    def hook_for(name: str, heads: int | None):
        def hook(module, args, output):
            y = stack.apply(name, args[0].detach().numpy(), output.shape[-1])
            if heads:
                y = to_hf_rows(y, heads)
            return output + torch.from_numpy(np.ascontiguousarray(y))

        return hook

    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        name, heads = f"{path}.weight", None
        if stack.naming == "gguf":
            name = f"{names.get_name(path)}.weight"
            rotary = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads = rotary.get(path.rpartition(".")[2])
        if name in stack.weights:
            used.add(name)
            handles.append(module.register_forward_hook(hook_for(name, heads)))
    assert used == set(stack.weights), f"no layer for {set(stack.weights) - used}"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits of every position, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def cases(folder: Path, program: str) -> list[tuple[str, list[tuple[str, float]], list[int], np.ndarray]]:
    """(key, stack, tokens, logits) of every case that a real program wrote down."""
    said = json.loads((folder / f"logits_{program}.json").read_text())
    arrays = np.load(folder / f"logits_{program}.npz")
    return [
        (f"s{s}_p{p}", [(name, scale) for name, scale in stack], tokens, arrays[f"s{s}_p{p}"])
        for s, stack in enumerate(said["stacks"])
        for p, tokens in enumerate(said["prompts"])
    ]
