"""The keys of PEFT's weights: their grammar."""

from __future__ import annotations

PREFIX = "base_model.model."
#: Ending of a key -> which part of a module's adapter it is.
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".token_adapter.trainable_tokens_delta": "new_tokens",
}


def split(name: str) -> tuple[str, str]:
    """(part, module path) of a key without its prefix; part is ``""`` for the base's own tensors."""
    for ending, part in PARTS.items():
        if name.endswith(ending):
            return part, name[: -len(ending)]
    return "", name.rpartition(".")[0]
