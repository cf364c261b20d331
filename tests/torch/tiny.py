"""Small randomly initialised models of many architectures, and adapters that the real PEFT makes for them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {**COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ConvNet(nn.Module):
    """Convolutions of one and two dimensions with stride and padding, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv2(x)).flatten(2)
        return self.head(torch.relu(self.conv1(h)).mean(-1))


def tokens(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(5))


def text_inputs() -> dict[str, Any]:
    return {"input_ids": tokens()}


def both_inputs() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5)}


def sound_inputs() -> dict[str, Any]:
    torch.manual_seed(3)
    return {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens(2, 5)}


def picture_inputs() -> dict[str, Any]:
    torch.manual_seed(3)
    return {"x": torch.randn(2, 3, 9, 9)}


#: name -> (how to make the model, target modules, inputs, embedding module, module to save)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[], dict[str, Any]], str, str]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), MLP, text_inputs, "embed_tokens", "lm_head"),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)), MLP, text_inputs, "embed_tokens", "lm_head"),
    "qwen3": (
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
        MLP,
        text_inputs,
        "embed_tokens",
        "lm_head",
    ),
    "mistral": (
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)),
        MLP,
        text_inputs,
        "embed_tokens",
        "lm_head",
    ),
    "gemma": (
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, head_dim=8)),
        MLP,
        text_inputs,
        "embed_tokens",
        "up_proj",
    ),
    "gemma3": (
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=8)),
        MLP,
        text_inputs,
        "embed_tokens",
        "up_proj",
    ),
    "phi": (
        lambda: tf.PhiForCausalLM(tf.PhiConfig(**GROUPED)),
        ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
        text_inputs,
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        ["c_attn", "c_proj", "c_fc"],
        text_inputs,
        "wte",
        "c_fc",
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                **COMMON,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=32,
            )
        ),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        text_inputs,
        "embed_tokens",
        "fc2",
    ),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4)),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        text_inputs,
        "word_embeddings",
        "dense_4h_to_h",
    ),
    "gpt-neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        text_inputs,
        "embed_in",
        "embed_out",
    ),
    "bert": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)),
        ["query", "key", "value", "dense"],
        text_inputs,
        "word_embeddings",
        "classifier",
    ),
    "roberta": (
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL)),
        ["query", "value"],
        text_inputs,
        "word_embeddings",
        "classifier",
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        ["q", "k", "v", "o", "wi", "wo"],
        both_inputs,
        "shared",
        "lm_head",
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **COMMON,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=20,
                max_target_positions=20,
                decoder_start_token_id=1,
            )
        ),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        sound_inputs,
        "embed_tokens",
        "fc2",
    ),
    "convnet": (ConvNet, ["conv2", "conv1", "head"], picture_inputs, "", "head"),
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name][0]().eval()


def output(model: nn.Module, name: str) -> torch.Tensor:
    """The model's logits on fixed inputs."""
    with torch.no_grad():
        result = model(**ARCHITECTURES[name][2]())
    return result.logits if hasattr(result, "logits") else result


def save_adapter(model: nn.Module, folder: Path, seed: int = 0, trained: bool = True, **config: Any) -> Path:
    """An adapter of random factors for ``model``, saved by PEFT; what else it trains is shaken too."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            copy.deepcopy(model), LoraConfig(**{"init_lora_weights": False, "lora_alpha": 6, "r": 4} | config)
        )
        if trained:
            with torch.no_grad():
                for parameter_name, parameter in peft.named_parameters():
                    if (
                        parameter.requires_grad
                        and "lora_A" not in parameter_name
                        and "lora_embedding" not in parameter_name
                    ):
                        parameter.add_(0.1 * torch.randn_like(parameter))
        peft.save_pretrained(str(folder))
    return folder


def set_scales(peft: nn.Module, scales: dict[str, float]) -> None:
    """PEFT with several adapters active at these scales, in this order."""
    peft.base_model.set_adapter(list(scales))
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                if name in module.scaling:
                    module.scaling[name] *= scale


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())
