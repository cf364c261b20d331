"""Updates of parameters: which one factors belong to, which way round they are, and what models do with them."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

from lorastack import LoadedLora, LoraStack, load
from lorastack.base import open_base
from lorastack.base.fit import misfits
from lorastack.errors import FormatError, LoraStackError, UnsupportedError
from lorastack.merging import merge
from lorastack.torch import attach, merge_into
from lorastack.torch.weight import LoraWeight
from tests.torch.families import logits
from tests.torch.tiny import GROUPED, far, make_model, tokens

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}


def experts_model(width: int = 24, experts: int = 4) -> nn.Module:
    torch.manual_seed(0)
    said = {**EXPERTS, "num_experts": experts, "num_experts_per_tok": min(2, experts)}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **said, moe_intermediate_size=width, head_dim=8)).eval()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **{**GROUPED, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    model = tf.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts" in name or "router" in name:
                weight.normal_(std=0.1)
    return model


def saved(model: nn.Module, folder: Path, **config: Any) -> torch.Tensor:
    """PEFT's own logits with an adapter that is saved."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **config))
        peft.eval().save_pretrained(folder)
    return logits(peft)


def distances(model: nn.Module, folder: Path, base: Path, expected: torch.Tensor) -> dict[str, float]:
    """How far an adapter is off attached, merged into the live model and into files; what does not fit is infinite."""
    lora, found = load(folder), {}
    with attach(model, lora):
        found["attached"] = far(logits(model), expected)
    with merge_into(model, lora, exact=True):
        found["merged live"] = far(logits(model), expected)
    model.save_pretrained(base)
    found |= dict.fromkeys(misfits(lora, open_base(base)), math.inf)
    merge(base, LoraStack([(lora, 1.0)]), base.parent / "merged")
    found["merged"] = far(logits(type(model).from_pretrained(base.parent / "merged").eval()), expected)
    return found


@pytest.mark.parametrize("target", ["attn.c_proj.weight", "c_attn.weight", "wte.weight"])
def test_a_weight_that_is_kept_turned_over(target: str, tmp_path: Path) -> None:
    model = make_model("gpt2")
    expected = saved(model, tmp_path / "a", target_modules=[], target_parameters=[target])
    lora = load(tmp_path / "a")
    assert {delta.kind for delta in lora.adapters.values()} == {"stored"}
    if target == "wte.weight":  # its head is tied, and PEFT leaves that one alone
        with attach(model, lora):
            assert far(logits(model), expected) < 1e-5
    else:
        assert max(distances(model, tmp_path / "a", tmp_path / "base", expected).values()) < 2e-5
    again = lora.save(tmp_path / "again")
    one, other = load(again), lora
    for name in other.adapters:
        np.testing.assert_array_equal(one.adapters[name].dense(), other.adapters[name].dense())


def test_names_without_an_owner_are_parameters_of_whatever_has_them(tmp_path: Path) -> None:
    model = experts_model()
    expected = saved(model, tmp_path / "a", target_modules=["q_proj", "gate", "gate_proj", "up_proj", "down_proj"])
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sorted(said["target_parameters"]) == ["down_proj", "gate.weight", "gate_up_proj"]
    assert max(distances(model, tmp_path / "a", tmp_path / "base", expected).values()) < 2e-5
    baked = LoraStack([(load(tmp_path / "a"), 1.0)]).bake()
    folder = baked.save(tmp_path / "baked")
    with attach(model, load(folder)):
        assert far(logits(model), expected) < 1e-5


def test_one_bare_name_invents_no_weight(tmp_path: Path) -> None:
    model = experts_model()
    expected = saved(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=["down_proj"])
    assert all(name.endswith(("q_proj.weight", "experts.down_proj")) for name in load(tmp_path / "a").adapters)
    with attach(model, load(tmp_path / "a")):
        assert far(logits(model), expected) < 1e-5


def test_one_expert_is_an_expert(tmp_path: Path) -> None:
    model = experts_model(experts=1)
    expected = saved(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    assert max(distances(model, tmp_path / "a", tmp_path / "base", expected).values()) < 2e-5


def old_layout(model: nn.Module, folder: Path, version: str | None) -> torch.Tensor:
    """An adapter of down_proj as PEFT 0.17 and 0.18 kept it, ``A^T B^T`` of the parameter; logits of the dense sum."""
    saved(model, folder, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text()) | {"peft_version": version}
    config.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, block in enumerate(changed.model.layers):
            start = f"base_model.model.model.layers.{layer}"
            a, b = (torch.tensor(tensors[f"{start}.mlp.experts.lora_{half}.weight"]) for half in "AB")
            a, b = a.reshape(4, 3, -1), b.reshape(b.shape[0], 3, 4).permute(2, 0, 1)
            block.mlp.experts.down_proj += 2.0 * a.transpose(1, 2) @ b.transpose(1, 2)
            a, b = (torch.tensor(tensors[f"{start}.self_attn.q_proj.lora_{half}.weight"]) for half in "AB")
            block.self_attn.q_proj.weight += 2.0 * b @ a
    return logits(changed)


def test_square_experts_of_older_versions_are_the_other_way_round(tmp_path: Path) -> None:
    model = experts_model(width=32)
    expected = old_layout(model, tmp_path / "a", "0.18.1")
    assert max(distances(model, tmp_path / "a", tmp_path / "base", expected).values()) < 2e-5
    lora = load(tmp_path / "a")
    with pytest.raises(FormatError, match="which way round its experts are, only the base tells"):
        lora.save(tmp_path / "again")
    settled = LoraStack([(lora, 1.0)]).bake(base=tmp_path / "base").save(tmp_path / "again")
    with attach(model, load(settled)):
        assert far(logits(model), expected) < 1e-5


def test_square_experts_of_no_version_are_refused_but_where_the_model_says(tmp_path: Path) -> None:
    model = experts_model(width=32)
    old_layout(model, tmp_path / "a", None)
    with pytest.raises(LoraStackError, match=r"down_proj is square, and adapter_config.json has no peft_version"):
        attach(model, load(tmp_path / "a"))
    other = gpt_oss()
    expected = old_layout(other, tmp_path / "b", None)  # it keeps them [E, in, out] itself: both versions mean the same
    with attach(other, load(tmp_path / "b")):
        assert far(logits(other), expected) < 1e-5


def test_what_is_linear_in_a_weight_is_computed_of_its_parts() -> None:
    torch.manual_seed(0)
    left, right, x = torch.randn(4, 6, 2), torch.randn(4, 2, 8), torch.randn(4, 3, 6)
    base = torch.randn(4, 6, 8)

    class Owner:
        reached = False

    owner = Owner()
    weight: Any = LoraWeight.of(base, left, right, owner)
    whole = base + left @ right
    one, flat = weight[1], whole[1]
    rows = LoraWeight.of(base[0].T, right[0].T, left[0].T, owner)
    cases: dict[str, tuple[Any, Any]] = {
        "bmm": (torch.bmm(x, weight), torch.bmm(x, whole)),
        "matmul": (x @ weight, x @ whole),
        "from the left": (weight @ x.mT, whole @ x.mT) if False else (weight.mT @ x.mT, whole.mT @ x.mT),
        "linear": (F.linear(x[0], one.T), F.linear(x[0], flat.T)),
        "float": (x @ weight.double().float(), x @ whole),
        "einsum": (torch.einsum("ebi,eio->bo", x, weight), torch.einsum("ebi,eio->bo", x, whole)),
        "columns": (x @ weight[..., 2:5], x @ whole[..., 2:5]),
        "rows": (x[..., :3] @ weight[:, :3], x[..., :3] @ whole[:, :3]),
        "chunk": (x @ weight.chunk(2, dim=-1)[1], x @ whole.chunk(2, dim=-1)[1]),
        "picked": (x[:2] @ weight[torch.tensor([3, 0])], x[:2] @ whole[torch.tensor([3, 0])]),
        "addmm": (torch.addmm(torch.ones(3, 8), x[0], one), torch.addmm(torch.ones(3, 8), x[0], flat)),
        "embedding": (F.embedding(torch.tensor([1, 5]), one), flat[[1, 5]]),
        "cat": (torch.cat([rows, torch.ones(2, 6)]) @ x[0].T, torch.cat([whole[0].T, torch.ones(2, 6)]) @ x[0].T),
        "view": (x @ LoraWeight.of(base.view(24, 8), left.reshape(24, 2), right[0], owner).view(4, 6, 8),
                 x @ (base + left @ right[0])),
        "permute": (torch.bmm(weight.permute(0, 2, 1), x.mT), torch.bmm(whole.permute(0, 2, 1), x.mT)),
    }  # fmt: skip
    for label, (found, expected) in cases.items():
        assert far(found, expected) < 1e-5, label
    assert owner.reached
    for nonlinear in (lambda: weight.norm(), lambda: torch.softmax(weight, -1), lambda: weight * weight):
        with pytest.raises(UnsupportedError, match="updates are not known to pass through"):
            nonlinear()


def test_an_attention_as_a_whole(tmp_path: Path) -> None:
    """PEFT adds the update of its output projection twice, in training too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mha(x, x, x)[0]

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["mha"], init_lora_weights=False))
        peft.eval().save_pretrained(tmp_path / "one")
    with torch.no_grad():
        expected = peft(x)
        lora = load(tmp_path / "one")
        with attach(model, lora) as handle:
            assert far(model(x), expected) < 1e-5
            assert "had no effect" not in str(handle.unused())
        with merge_into(model, lora):
            assert far(model(x), expected) < 1e-5

        # Saved again, alone or with another of another rank: PEFT keeps one inside the other, of one rank and alpha.
        wide = LoraConfig(r=3, lora_alpha=9, target_modules=["mha"], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(copy.deepcopy(model), wide).save_pretrained(tmp_path / "other")
        other = load(tmp_path / "other")
        only_out = other.select("*.out_proj.*")
        for n, stack in enumerate(([(lora, 1.0)], [(lora, 0.5), (other, -2.0)], [(lora, 1.0), (only_out, 0.3)])):
            with attach(model, LoraStack(stack)):
                expected = model(x)
            folder = LoraStack(stack).bake().save(tmp_path / f"again-{n}")
            with attach(model, load(folder)):
                assert far(model(x), expected) < 1e-5
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = PeftModel.from_pretrained(copy.deepcopy(model), folder)
            assert far(again.eval()(x), expected) < 1e-5


def test_in_memory_updates_of_experts_go_through_llama_4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=4,
                                 num_experts_per_tok=1, interleave_moe_layer_step=1)  # fmt: skip
    model = tf.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "experts." in name and weight.dim() == 3:
                weight.normal_(std=0.1)
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    expected = saved(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=targets)
    with attach(model, load(tmp_path / "a")):
        assert far(logits(model), expected) < 1e-5
    assert isinstance(load(tmp_path / "a"), LoadedLora)
    assert tokens().shape == (2, 7)
