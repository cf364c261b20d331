"""Architectures whose row order between Hugging Face and GGUF is known, listed one by one.

llama.cpp's converter reorders rows of some weights (conversion/*.py there, ``modify_tensors``). An
adapter converted by the wrong rule loads and answers slightly wrong, so what is not listed is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lorastack.errors import UnsupportedError


class Architecture(NamedTuple):
    """One Hugging Face model class and what its GGUF conversion does."""

    hf: str
    gguf: str
    #: "keep"; "rotary": rows of q and k interleaved by rotary pair; "fused": rows of a fused qkv by part, not head.
    rows: str
    #: Prefix of the model's own weight names, which some files on the hub leave out.
    prefix: str = "model"


_LISTED = (
    Architecture("LlamaForCausalLM", "llama", "rotary"),
    Architecture("MistralForCausalLM", "llama", "rotary"),
    Architecture("MixtralForCausalLM", "llama", "rotary"),
    Architecture("Qwen2ForCausalLM", "qwen2", "keep"),
    Architecture("Qwen2MoeForCausalLM", "qwen2moe", "keep"),
    Architecture("Qwen3ForCausalLM", "qwen3", "keep"),
    Architecture("Qwen3MoeForCausalLM", "qwen3moe", "keep"),
    Architecture("GemmaForCausalLM", "gemma", "keep"),
    Architecture("Gemma2ForCausalLM", "gemma2", "keep"),
    Architecture("Gemma3ForCausalLM", "gemma3", "keep"),
    Architecture("PhiForCausalLM", "phi2", "keep"),
    Architecture("Phi3ForCausalLM", "phi3", "keep"),
    Architecture("Qwen2VLForConditionalGeneration", "qwen2vl", "keep"),
    Architecture("Qwen2_5_VLForConditionalGeneration", "qwen2vl", "keep"),
    Architecture("GPT2LMHeadModel", "gpt2", "keep", "transformer"),
    Architecture("BloomForCausalLM", "bloom", "fused", "transformer"),
    Architecture("GPTNeoXForCausalLM", "gptneox", "fused", "gpt_neox"),
)
BY_HF = {a.hf: a for a in _LISTED}
#: `model_type` of the text part -> the class that it is by itself, for models with pictures or sound beside it.
_BY_TEXT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
#: "llama" stands for several classes with one rule.
BY_GGUF = {a.gguf: a for a in reversed(_LISTED)}

Permute = Callable[[np.ndarray], np.ndarray]


def architecture_of(name: str | None, naming: str, text_type: str | None = None) -> Architecture:
    """The listed architecture of that Hugging Face class or GGUF architecture.

    A class that wraps a text model (``text_type`` is its ``model_type``) is converted as that text model; a backbone
    saved by itself (``LlamaModel``) as the whole.

    Raises
    ------
    UnsupportedError
        When it is not listed.
    """
    table = BY_GGUF if naming == "gguf" else BY_HF
    if name in table:
        return table[name]
    if naming == "hf":
        stem = (name or "").removesuffix("Model")
        for other in (_BY_TEXT.get(text_type or ""), f"{stem}ForCausalLM", f"{stem}LMHeadModel"):
            if other in table:
                return table[other]
    raise UnsupportedError(
        f"architecture {name!r}: its row order between Hugging Face and GGUF is not known here, so names are not "
        f"converted; known are {', '.join(sorted(table))}"
    )


def row_order(arch: Architecture, gguf_name: str, heads: int, kv_heads: int, to: str) -> Permute | None:
    """How the output rows of that weight move when converted to ``to``; None when they stay.

    The function takes an array whose first axis is the output (lora_B, a bias, a magnitude).
    """
    stem = gguf_name.removesuffix(".weight").rpartition(".")[2]
    if arch.rows == "rotary" and stem in ("attn_q", "attn_k"):
        count = heads if stem == "attn_q" else kv_heads
        return _swap(count, 2, -1) if to == "gguf" else _swap(count, -1, 2)
    if arch.rows == "fused" and stem == "attn_qkv":
        return _swap_outer(heads, 3) if to == "gguf" else _swap_outer(3, heads)
    return None


def rows_misfit(arch: Architecture, gguf_name: str, heads: int, kv_heads: int, rows: int) -> str | None:
    """Why the rows of that weight cannot be moved; None where they can, or stay."""
    stem = gguf_name.removesuffix(".weight").rpartition(".")[2]
    if arch.rows == "rotary" and stem in ("attn_q", "attn_k"):
        count, parts, what = heads if stem == "attn_q" else kv_heads, 2, "heads of two halves"
    elif arch.rows == "fused" and stem == "attn_qkv":
        count, parts, what = heads, 3, "heads of three parts"
    else:
        return None
    return f"its {rows} rows are no {count} {what}" if rows % (count * parts) else None


def _swap(heads: int, first: int, second: int) -> Permute:
    """``[heads, first, second, ...] -> [heads, second, first, ...]``; -1 is what is left."""

    def permute(array: np.ndarray) -> np.ndarray:
        rest = array.shape[1:]
        size = array.shape[0] // heads // 2
        one, two = (first, size) if first == 2 else (size, second)
        return array.reshape(heads, one, two, *rest).swapaxes(1, 2).reshape(array.shape)

    return permute


def _swap_outer(first: int, second: int) -> Permute:
    """``[first, second, d, ...] -> [second, first, d, ...]``."""

    def permute(array: np.ndarray) -> np.ndarray:
        return array.reshape(first, second, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return permute
