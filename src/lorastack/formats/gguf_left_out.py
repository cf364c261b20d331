"""Tensors to which llama.cpp adds no update at run time: it takes the adapter, and computes as if they were not there.

Its graphs add an adapter where they multiply through ``build_lora_mm``, and to ``token_embd``; what they look up, or
multiply by themselves (``ggml_mul_mat`` in src/models/*.cpp), is left as it is. An adapter written with such a tensor
would lose that part without a word.
"""

from __future__ import annotations

#: Looked up, not multiplied, wherever there is one.
EVERYWHERE = frozenset({"position_embd", "token_types", "per_layer_token_embd"})
#: DeepSeek's latent attention, which is multiplied out ahead; and the head beside it.
_LATENT = frozenset({"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"})
BY_ARCHITECTURE = {
    "deepseek2": _LATENT | {"attn_q", "attn_k_b", "attn_v_b", "output"},
    "minicpm3": _LATENT,
    "gemma3n": frozenset({"per_layer_model_proj", "altup_proj", "altup_unembd_proj", "altup_router"}),
    "gemma4": frozenset({"per_layer_model_proj"}),
}


def left_out(architecture: str, name: str) -> bool:
    """Whether llama.cpp leaves an update of that tensor out of account.

    >>> left_out("deepseek2", "blk.0.attn_kv_a_mqa.weight"), left_out("llama", "blk.0.attn_q.weight")
    (True, False)
    """
    stem = name.removesuffix(".weight").rpartition(".")[2]
    return stem in EVERYWHERE or stem in BY_ARCHITECTURE.get(architecture, ())
