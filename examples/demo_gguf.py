"""Write the demo model and its adapters for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, tokenizer)
    for key, weight in model.state_dict().items():
        if key != "lm_head.weight":  # tied: llama.cpp falls back on the embedding
            writer.add_tensor(_gguf_name(key, model.config), _reorder(key, weight, model.config))
    _finish(writer)


def write_adapter(path: Path, weights: dict[str, torch.Tensor], alpha: float, config: LlamaConfig, name: str) -> None:
    """`weights` are PEFT's: `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, weight in weights.items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        target = f"{module}.weight"
        # The base's output rows are the adapter's too, and only B has them.
        array = _reorder(target, weight, config) if half == "lora_B" else _array(weight)
        writer.add_tensor(f"{_gguf_name(target, config)}.{half.lower()}", array)
    _finish(writer)


def _add_shape(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The only place `tokenizers` shows the merges of a trained model is its own JSON."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def _gguf_name(key: str, config: LlamaConfig) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    name = names.get_name(key, try_suffixes=(".weight",))
    if name is None:
        raise ValueError(f"{key} has no GGUF name in the llama architecture")
    return name


def _reorder(key: str, weight: torch.Tensor, config: LlamaConfig) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of q and k, transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = key.split(".")[-2]
    array = _array(weight)
    if module not in heads:
        return array
    rows, columns = array.shape
    halves = array.reshape(heads[module], 2, rows // heads[module] // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _array(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().to(torch.float32).contiguous().numpy()


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
