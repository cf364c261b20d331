"""Rows where the batch is not the first axis: time before batch, tables of positions, pictures, biases of lora_B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from lorastack import load
from lorastack.errors import ShapeError, UnsupportedError
from lorastack.torch import attach
from tests.torch.architectures import Architecture, architectures, inputs_of, made
from tests.torch.families import qwen2_vl
from tests.torch.test_architectures import saved
from tests.torch.tiny import SMALL, ConvNet, far

ALL = {str(one): one for usual in (True, False) for one in architectures(usual)}
MIXTURES: list[dict[str, float]] = [{"a": 1.0}, {"a": -0.5}, {}]


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def row(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    return {k: v[n : n + 1] if isinstance(v, torch.Tensor) and v.shape[:1] == (3,) else v for k, v in inputs.items()}


def check(model: nn.Module, folder: Path, inputs: dict[str, Any], **config: Any) -> None:
    """Every row is what it is alone, under its own scale."""
    saved(model, folder / "a", **config)
    with attach(model, load(folder / "a")) as handle:
        with handle.rows(MIXTURES):
            found = output(model, inputs)
        for n, mixture in enumerate(MIXTURES):
            handle.set_scale("a", mixture.get("a", 0.0))
            assert far(found[n : n + 1], output(model, row(inputs, n))) < 1e-5


def ids(length: int) -> torch.Tensor:
    return torch.randint(6, 90, (3, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("length", [8, 3])  # with as many tokens as rows nothing in the shapes tells the axes
@pytest.mark.parametrize("name", ["causal-xlnet", "masked-longformer", "seq2seq-led", "seq2seq-fsmt"])
def test_time_may_come_before_the_batch(name: str, length: int, tmp_path: Path) -> None:
    one: Architecture = ALL[name]
    model = made(one)
    inputs = {**inputs_of(one.family, model), "input_ids": ids(length)}
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = ids(length)
    check(model, tmp_path, inputs, target_modules="all-linear")


@pytest.mark.parametrize(("name", "table"), [("causal-gpt2", "wpe"), ("masked-bert", "position_embeddings")])
@pytest.mark.parametrize("length", [7, 3])
def test_positions_that_are_looked_up_once_for_all_rows(name: str, table: str, length: int, tmp_path: Path) -> None:
    model = made(ALL[name])
    check(model, tmp_path, {"input_ids": ids(length)}, target_modules=[table])


def test_a_table_that_layers_compute_with_is_refused_before_the_first_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    said = {**SMALL, "relative_attention": True, "position_buckets": 16, "max_relative_positions": -1,
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}  # fmt: skip
    deberta = tf.DebertaV2Model(tf.DebertaV2Config(**said)).eval()
    saved(deberta, tmp_path / "a", target_modules=["query_proj", "key_proj", "value_proj"])
    with (
        attach(deberta, load(tmp_path / "a")) as handle,
        pytest.raises(UnsupportedError, match=r"attention.self.query_proj.weight, which sees a table of positions"),
        handle.rows(MIXTURES),
    ):
        pass
    check(deberta, tmp_path / "b", {"input_ids": ids(7) % 60}, target_modules=["value_proj", "dense"])
    t5 = made(ALL["seq2seq-t5"])
    saved(t5, tmp_path / "c" / "a", target_modules=["relative_attention_bias"])
    with (
        attach(t5, load(tmp_path / "c" / "a")) as handle,
        pytest.raises(UnsupportedError, match=r"relative_attention_bias.weight, which sees a table of positions"),
        handle.rows(MIXTURES),
    ):
        pass


def test_pictures_of_unequal_size_do_not_tell_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = qwen2_vl().eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "visual" in n]
    saved(model, tmp_path / "a", target_modules=names)
    model.config.image_token_id = 63
    text = ids(30) % 50
    for n, count in enumerate((16, 4, 4)):
        text[n, :count] = 63
    inputs = {"input_ids": text, "pixel_values": torch.randn(24, 48), "mm_token_type_ids": (text == 63).int(),
              "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2], [1, 2, 2]])}  # fmt: skip
    with (
        attach(model, load(tmp_path / "a")) as handle,
        handle.rows(MIXTURES),
        pytest.raises(ShapeError, match="differ in size or number from row to row"),
    ):
        output(model, inputs)


@pytest.mark.parametrize("experts", ["experts.1", "experts.expert_1"])
def test_experts_that_are_layers_are_refused(experts: str, tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            holder, number = experts.split(".")
            self.experts = nn.ModuleDict({number: nn.Linear(4, 4)})
            assert holder == "experts"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return next(iter(self.experts.values()))(x.reshape(-1, 4)[:3])

    model = Block()
    saved(model, tmp_path / "a", target_modules=[experts])
    with (
        attach(model, load(tmp_path / "a")) as handle,
        pytest.raises(UnsupportedError, match="it changes experts, whose tokens are no longer in rows"),
        handle.rows(MIXTURES),
    ):
        pass


def test_biases_of_lora_b_go_by_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    said = {"lora_bias": True}
    check(made(ALL["causal-qwen2"]), tmp_path / "1", {"input_ids": ids(7)}, target_modules=["q_proj", "k_proj"], **said)
    check(ConvNet().eval(), tmp_path / "2", {"x": torch.randn(3, 3, 9, 9)}, target_modules=["conv2", "conv1"], **said)
