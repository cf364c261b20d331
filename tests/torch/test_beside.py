"""What PEFT trains beside layers: tokens of shared weights, biases of routers, norms of batches, embeddings' DoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from lorastack import LoraStack, load
from lorastack.base import open_base
from lorastack.base.fit import misfits
from lorastack.errors import UnsupportedError
from lorastack.torch import attach, merge_into
from tests.torch.families import made
from tests.torch.test_parameters import gpt_oss
from tests.torch.tiny import COMMON, GROUPED, far

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(5))
TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, 2:6]}
PICTURE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SEEN = IDS[0, 2:5].tolist()


def bart() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
    return tf.BartForConditionalGeneration(tf.BartConfig(**COMMON, **sizes, decoder_start_token_id=2))


def llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **more))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(num_channels=3, **sizes))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(60, 8), nn.Linear(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(input_ids).mean(1))


#: label -> (model, inputs, what PEFT is told)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "tokens that T5's encoder, decoder and head share": (
        lambda: made("t5"),
        BOTH,
        {"target_modules": ["q"], "trainable_token_indices": {"shared": SEEN}},
    ),
    "tokens that BART's share": (
        bart,
        BOTH,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"shared": SEEN}},
    ),
    "tokens of a head": (
        llama,
        TEXT,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": SEEN, "lm_head": [1, 2]}},
    ),
    "tokens of a tied head of its own": (
        lambda: llama(tie_word_embeddings=True),
        TEXT,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": SEEN, "lm_head": [1, 2]}},
    ),
    "biases of routers": (gpt_oss, TEXT, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of a saved module": (
        lambda: made("bert"),
        TEXT,
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["cls"]},
    ),
    "norms of batches": (
        resnet,
        {"pixel_values": PICTURE},
        {"target_modules": ["convolution"], "modules_to_save": ["normalization"]},
    ),
    "an embedding with DoRA": (Bag, TEXT, {"target_modules": ["emb", "head"], "use_dora": True}),
    "a scaled embedding with DoRA": (
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=8)),
        TEXT,
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ),
    "a convolution in groups": (Grouped, {"x": torch.ones(2, 8, 5, 5)}, {"target_modules": ["conv"]}),
    "a convolution in groups with DoRA": (
        Grouped,
        {"x": torch.ones(2, 8, 5, 5)},
        {"target_modules": ["conv"], "use_dora": True},
    ),
}


def trained(model: nn.Module, folder: Path, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, init_lora_weights=False, **config)).eval()
        with torch.no_grad():
            for name, weight in peft.named_parameters():
                if weight.requires_grad and "lora_A" not in name and "lora_emb" not in name:
                    weight.add_(0.1 * torch.randn_like(weight))
            for name, buffer in peft.named_buffers():
                if "modules_to_save" in name and buffer.is_floating_point():
                    buffer.add_(0.1)
        peft.save_pretrained(folder, save_embedding_layers=False)
    return peft


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result


@pytest.mark.parametrize("label", CASES)
def test_it_is_what_peft_computes(label: str, tmp_path: Path) -> None:
    make, inputs, config = CASES[label]
    torch.manual_seed(0)
    model = make().eval()
    base, expected = output(model, inputs), output(trained(model, tmp_path, **config), inputs)
    lora = load(tmp_path)
    with attach(model, lora):
        assert far(output(model, inputs), expected) < 1e-5
    assert torch.equal(output(model, inputs), base)
    assert far(base, expected) > 1e-3
    if "in groups" in label:  # such an update is of all channels, and no weight in groups holds it
        with pytest.raises(UnsupportedError, match="groups"):
            merge_into(model, lora)
        return
    with merge_into(model, lora, exact=True):
        assert far(output(model, inputs), expected) < 1e-5
    assert torch.equal(output(model, inputs), base)


def test_tokens_of_two_adapters_go_together_where_they_are_not_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval()
    rows = {}
    for n, tokens in enumerate((SEEN[:1], SEEN[1:2], SEEN[:2])):
        trained(
            model, tmp_path / str(n), n, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": tokens}
        )
        rows[n] = load(tmp_path / str(n)).extras["new_tokens"]["model.embed_tokens.weight"][1].array
    loras = [load(tmp_path / str(n)) for n in range(3)]
    expected = copy.deepcopy(model)
    with attach(model, LoraStack([(loras[0], 1.0), (loras[1], 1.0)])):
        found = output(model, TEXT)
    with torch.no_grad():
        expected.model.embed_tokens.weight[SEEN[0]] = torch.tensor(rows[0][0])
        expected.model.embed_tokens.weight[SEEN[1]] = torch.tensor(rows[1][0])
    plain = [one.without_extras("new_tokens") for one in loras]
    with attach(expected, LoraStack([(plain[0], 1.0), (plain[1], 1.0)])):
        assert far(found, output(expected, TEXT)) < 1e-5
    said = f"0 and 2 both replace token {SEEN[0]} of model.embed_tokens.weight; attach only one"
    with pytest.raises(UnsupportedError, match=said):
        attach(model, LoraStack([(loras[0], 1.0), (loras[2], 1.0)]))


def test_rows_that_were_added_to_a_vocabulary_come_with_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = llama().eval()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model.resize_token_embeddings(70)
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), config).eval()
        peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    inputs = {"input_ids": torch.tensor([[5, 66, 7, 69]])}
    expected = output(peft, inputs)
    other: Any = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(2)
    other.resize_token_embeddings(70)  # its new rows are others
    base = output(other, inputs)
    with attach(other, load(tmp_path / "a")) as handle:
        assert far(output(other, inputs), expected) < 1e-5
        handle.set_scale("a", 0.0)
        assert torch.equal(output(other, inputs), base)
        handle.set_scale("a", 1.0)
        handle.push(load(tmp_path / "a").without_extras("base_weight"), 0.5)
        assert far(output(other, inputs), expected) > 1e-3
        handle.pop()
        assert far(output(other, inputs), expected) < 1e-5
    assert torch.equal(output(other, inputs), base)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1  # not an added row: a changed base
    with pytest.raises(UnsupportedError, match="the adapter was trained on a changed base"):
        attach(other, load(tmp_path / "a"))


def test_biases_of_routers_fit_the_files_too(tmp_path: Path) -> None:
    model: Any = gpt_oss()
    trained(model, tmp_path / "a", target_modules=["q_proj"], bias="all")
    model.save_pretrained(tmp_path / "base")
    assert misfits(load(tmp_path / "a"), open_base(tmp_path / "base")) == []
