"""Every file of the reference data is loaded right, or refused with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from lorastack import LoadedLora, load
from lorastack.base import open_base
from lorastack.base.fit import misfits
from lorastack.errors import FormatError
from tests.conftest import SHARED


class Adapter(NamedTuple):
    """What an adapter is known to hold, from its own documentation and from llama.cpp or PEFT."""

    weights: int
    rank: int
    alpha: float | None
    #: One weight, its scaling and the shape of its whole update.
    sample: tuple[str, float, tuple[int, ...]]
    kinds: frozenset[str] = frozenset({"linear"})
    extras: dict[str, int] = {}  # noqa: RUF012


LLAMA_Q = "model.layers.{}.self_attn.q_proj.weight"
ROBERTA_QUERY = "roberta.encoder.layer.11.attention.self.query.weight"

GGUF = {
    "gguf_cases/lora_a.gguf": Adapter(15, 4, 8, ("blk.1.ffn_down.weight", 2.0, (64, 128))),
    "gguf_cases/lora_b.gguf": Adapter(4, 6, 9, ("blk.0.attn_q.weight", 1.5, (64, 64))),
    "gguf_cases/lora_b32.gguf": Adapter(4, 6, 9, ("blk.0.attn_q.weight", 1.5, (64, 64))),
    "gguf_cases/lora_noalpha.gguf": Adapter(1, 4, None, ("blk.0.attn_q.weight", 1.0, (64, 64))),
    "gguf_cases/lora_alpha0.gguf": Adapter(1, 4, None, ("blk.0.attn_q.weight", 1.0, (64, 64))),
    "gguf_cases/lora_embd.gguf": Adapter(1, 4, 8, ("token_embd.weight", 2.0, (64, 96)), frozenset({"embedding"})),
    "gguf_cases/lora_moe.gguf": Adapter(
        10, 4, 8, ("blk.0.ffn_gate_exps.weight", 2.0, (4, 128, 64)), frozenset({"linear", "experts"})
    ),
    "gguf_cases/ok_norm.gguf": Adapter(1, 4, 8, ("blk.0.attn_q.weight", 2.0, (64, 64)), extras={"norm": 1}),
    # What is wrong with these three shows only beside the base: see below.
    "gguf_cases/bad_arch.gguf": Adapter(1, 4, 8, ("blk.0.attn_q.weight", 2.0, (64, 64))),
    "gguf_cases/bad_name.gguf": Adapter(1, 4, 8, ("blk.7.attn_q.weight", 2.0, (64, 64))),
    "gguf_cases/bad_shape.gguf": Adapter(1, 4, 8, ("blk.0.attn_q.weight", 2.0, (64, 32))),
    "stories260k/gguf/excited.f32.gguf": Adapter(10, 4, 8, ("blk.4.attn_v.weight", 2.0, (32, 64))),
    "stories260k/gguf/excited.f16.gguf": Adapter(10, 4, 8, ("blk.4.attn_v.weight", 2.0, (32, 64))),
    "stories260k/gguf/zara.f32.gguf": Adapter(35, 8, 16, ("blk.4.attn_k.weight", 2.0, (32, 64))),
    "stories260k/gguf/zara.f16.gguf": Adapter(35, 8, 16, ("blk.4.attn_k.weight", 2.0, (32, 64))),
}

PEFT = {
    "peft/gpt2-tigrinya-v1": Adapter(36, 8, 32, ("transformer.h.11.attn.c_attn.weight", 4.0, (2304, 768))),
    "peft/gpt2-tigrinya-v2": Adapter(36, 8, 32, ("transformer.h.11.mlp.c_proj.weight", 4.0, (768, 3072))),
    "peft/dialogpt-small-patient": Adapter(36, 4, 8, ("transformer.h.0.attn.c_proj.weight", 2.0, (768, 768))),
    "peft/gptneo-125m-movies": Adapter(24, 8, 16, ("transformer.h.0.attn.attention.v_proj.weight", 2.0, (768, 768))),
    "peft/opencalm-1b-r1": Adapter(
        24, 1, 32, ("gpt_neox.layers.23.attention.query_key_value.weight", 32.0, (6144, 2048))
    ),
    "peft/roberta-mrpc-monteclora-ckpt230": Adapter(
        24, 8, 16, (ROBERTA_QUERY, 2.0, (768, 768)), extras={"modules_to_save": 4}
    ),
    "peft/roberta-mrpc-monteclora-ckpt460": Adapter(
        24, 8, 16, (ROBERTA_QUERY, 2.0, (768, 768)), extras={"modules_to_save": 4}
    ),
    "peft/peftreg-lora_mlp": Adapter(1, 8, 8, ("lin0.weight", 1.0, (20, 10))),
    "peft/peftreg-lora_mlp_modules_to_save": Adapter(
        1, 8, 8, ("lin0.weight", 1.0, (20, 10)), extras={"modules_to_save": 2}
    ),
    "peft/peftreg-lora_conv2d": Adapter(1, 8, 8, ("conv2d.weight", 1.0, (10, 5, 3, 3)), frozenset({"conv"})),
    "peft/peftreg-lora_emb_conv1d": Adapter(2, 8, 8, ("emb.weight", 1.0, (5, 100)), frozenset({"embedding", "linear"})),
    "peft/peftreg-lora_opt-125m_bnb_4bit": Adapter(
        24, 8, 8, ("model.decoder.layers.0.self_attn.q_proj.weight", 1.0, (768, 768))
    ),
    "stories260k/adapters/excited": Adapter(10, 4, 8, (LLAMA_Q.format(0), 2.0, (64, 64))),
    "stories260k/adapters/zara": Adapter(35, 8, 16, (LLAMA_Q.format(4), 2.0, (64, 64))),
    # rsLoRA: 16 / √16, not 16 / 16.
    "stories260k/adapters/robot-garden": Adapter(35, 16, 16, (LLAMA_Q.format(4), 4.0, (64, 64))),
    "stories260k/adapters/excited-dora": Adapter(15, 4, 8, (LLAMA_Q.format(4), 2.0, (64, 64)), extras={"dora": 15}),
}

#: Folder -> weights, rank, and the scale in its config, which MLX multiplies by as it is.
MLX = {"other/mlx-dpo-test": (4, 8, 20.0), "other/mlx-llama3-8b-discollama": (4, 8, 2.0)}
MLX_FILES = [f"{folder}/{file}" for folder in MLX for file in ("adapter_config.json", "adapters.safetensors")]

#: Weights of a PEFT folder, each of which loads as the folder does.
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "derived_adapter_model.safetensors")

WHOLE_MODEL = ("found None, expected 'adapter'", "whole model, give it as the base")
NOT_THIS = ("no safetensors file",)
NUMPY = ("a NumPy archive",)
REFUSED = {
    "gguf_cases/bad_type.gguf": ("general.type", "found 'model', expected 'adapter'"),
    "gguf_cases/bad_atype.gguf": ("adapter.type", "found 'loha', expected 'lora'"),
    "gguf_cases/bad_notype.gguf": ("adapter.type", "found None, expected 'lora'"),
    "gguf_cases/bad_suffix.gguf": ("blk.0.attn_q.weight.lora_c", "expected NAME.weight.lora_a or NAME.weight.lora_b"),
    "gguf_cases/bad_pair.gguf": ("blk.0.attn_q.weight.lora_a has no blk.0.attn_q.weight.lora_b",),
    "gguf_cases/bad_rank.gguf": ("blk.0.attn_q.weight", "lora_A is (4, 64) and lora_B is (64, 5)", "rank 4 against 5"),
    "gguf_cases/bad_alpha_u32.gguf": ("adapter.lora.alpha", "found UINT32, expected FLOAT32"),
    "gguf_cases/bad_alpha_f64.gguf": ("adapter.lora.alpha", "found FLOAT64, expected FLOAT32"),
    "gguf_cases/empty.gguf": ("no lora_a/lora_b tensors", "would change nothing"),
    "gguf_cases/base.gguf": WHOLE_MODEL,
    "gguf_cases/base_tied.gguf": WHOLE_MODEL,
    "gguf_cases/base_moe.gguf": WHOLE_MODEL,
    "gguf_cases/base_q8_0.gguf": WHOLE_MODEL,
    "stories260k/base.gguf": WHOLE_MODEL,
    "stories260k/base": ("whole model", "config.json, no adapter_config.json"),
    "stories260k/base/model.safetensors": ("no LoRA adapter", "47 tensors", "model.embed_tokens.weight"),
    "stories260k/base/config.json": NOT_THIS,
    "stories260k/base/generation_config.json": NOT_THIS,
    "stories260k/base/tokenizer.json": NOT_THIS,
    "stories260k/base/tokenizer_config.json": NOT_THIS,
    "stories260k/logits_llama_cpp.json": NOT_THIS,
    "stories260k/logits_peft.json": NOT_THIS,
    "stories260k/logits_llama_cpp.npz": NUMPY,
    "stories260k/logits_peft.npz": NUMPY,
    "gguf_cases/logits_llama_cpp.json": NOT_THIS,
    "gguf_cases/logits_llama_cpp.npz": NUMPY,
    "README.md": NOT_THIS,
    "other/sd15-cloneofsimo-analog-r4": ("cloneofsimo", "by position"),
    "other/sd15-cloneofsimo-analog-r4/analog_svd_rank4.safetensors": ("cloneofsimo", "by position"),
    "other/sd15-cloneofsimo-disney": ("cloneofsimo", "by position"),
    "other/sd15-cloneofsimo-disney/lora_disney.safetensors": ("cloneofsimo", "by position"),
    **{
        f"refuse/{folder}{file}": (f"peft_type is '{kind}'", "only 'LORA'")
        for folder, kind, weights in (
            ("nonlora-unilora-roberta", "UNILORA", "adapter_model.safetensors"),
            ("peftreg-adalora_mlp", "ADALORA", "adapter_model.bin"),
            ("peftreg-ia3_mlp", "IA3", "adapter_model.bin"),
        )
        for file in ("", "/adapter_config.json", f"/{weights}")
    },
    "refuse/peftreg-ia3_mlp/derived_base_seed0.safetensors": ("no LoRA adapter: 4 tensors", "lin0.bias"),
    "refuse/peftreg-ia3_mlp/derived_io.safetensors": ("no LoRA adapter: 2 tensors", "input"),
    "refuse/peftreg-ia3_mlp/output.pt": ("peft_type is 'IA3'",),
    "refuse/peftreg-adalora_mlp/output.pt": ("peft_type is 'ADALORA'",),
    **{
        f"peft/peftreg-{case}/{file}": words
        for case, bases in (
            ("lora_mlp", 4),
            ("lora_mlp_modules_to_save", 4),
            ("lora_conv2d", 4),
            ("lora_emb_conv1d", 5),
        )
        for file, words in (
            ("derived_base_seed0.safetensors", (f"no LoRA adapter: {bases} tensors",)),
            ("derived_io.safetensors", ("no LoRA adapter: 2 tensors", "input, expected")),
            ("output.pt", ("no state dict of tensors",)),
        )
    },
    # Folders of several things.
    "": ("several adapters", "peft/gpt2-tigrinya-v2"),
    "peft": ("several adapters", "peft/opencalm-1b-r1"),
    "other": ("several adapters", "mlx-dpo-test"),
    "refuse": ("several adapters", "peftreg-ia3_mlp"),
    "gguf_cases": ("several adapters", "lora_moe.gguf"),
    "stories260k/gguf": ("several adapters", "zara.f16.gguf"),
    "stories260k/adapters": ("several adapters", "robot-garden"),
    "stories260k": ("base.gguf", "whole model"),
}


def peft_folder(name: str) -> str | None:
    """The loadable folder that a file of a PEFT adapter belongs to."""
    folder, _, file = name.rpartition("/")
    return folder if folder in PEFT and file in ("adapter_config.json", *PEFT_FILES) else None


EVERYTHING = sorted(p.relative_to(SHARED).as_posix() for p in SHARED.rglob("*")) if SHARED.is_dir() else []
IN_PEFT_FOLDERS = [name for name in EVERYTHING if peft_folder(name)]


def test_every_file_and_folder_is_in_one_list(shared: Path) -> None:
    known = [*GGUF, *PEFT, *MLX, *MLX_FILES, *REFUSED, *IN_PEFT_FOLDERS]
    assert len(known) == len(set(known))
    there = {"" if name == "." else name for name in EVERYTHING} | {""}
    assert there - set(known) == set(), "neither loaded nor refused by a test here"
    assert set(known) - there == set(), "no longer in the reference data"
    assert len(IN_PEFT_FOLDERS) == 2 * len(PEFT) + 4


@pytest.mark.parametrize("folder", MLX)
def test_mlx_adapter_is_what_its_own_formula_says(shared: Path, folder: str) -> None:
    """``y + scale * (x @ lora_a) @ lora_b`` (mlx-lm, tuner/lora.py)."""
    weights, rank, scale = MLX[folder]
    lora = load(shared / folder)
    assert (lora.num_adapters(), lora.rank, lora.naming) == (weights, rank, "hf")
    parts = safetensors.torch.load_file(shared / folder / "adapters.safetensors")
    assert {f"{name}.weight" for name in {key.rpartition(".")[0] for key in parts}} == set(lora.adapters)
    for name, delta in lora.adapters.items():
        stem = name.removesuffix(".weight")
        a, b = (parts[f"{stem}.lora_{part}"].to(torch.float64).numpy() for part in "ab")
        ours = delta.scaling * (delta.b.astype(np.float64) @ delta.a)
        np.testing.assert_allclose(ours, scale * (a @ b).T, rtol=1e-6, atol=1e-12)
    alone = load(shared / folder / "adapters.safetensors")
    assert {name: str(delta) for name, delta in alone.adapters.items()} == {n: str(d) for n, d in lora.adapters.items()}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_adapter_is_loaded_as_the_gguf_package_reads_it(shared: Path, name: str) -> None:
    lora = load(shared / name)
    check_known(lora, GGUF[name], name.rpartition("/")[2].removesuffix(".gguf"), "gguf")
    reader = gguf.GGUFReader(shared / name)
    alpha = reader.fields["adapter.lora.alpha"].contents() if "adapter.lora.alpha" in reader.fields else 0
    parts = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    weights = {key.rpartition(".")[0] for key in parts if key.endswith((".lora_a", ".lora_b"))}
    assert set(lora.adapters) == weights
    for weight in weights:
        a, b = parts[f"{weight}.lora_a"], parts[f"{weight}.lora_b"]
        rank = b.shape[-1]
        expected = (b @ a.T if weight == "token_embd.weight" else b @ a) * (alpha / rank if alpha else 1.0)
        assert lora.adapters[weight].rank == rank
        close(lora.adapters[weight].dense(), expected)
    for norm, factor in lora.extras.get("norm", {}).items():
        np.testing.assert_array_equal(factor.array, parts[norm])


@pytest.mark.parametrize("name", [*PEFT, *IN_PEFT_FOLDERS])
def test_peft_adapter_is_loaded_as_torch_reads_it(shared: Path, name: str) -> None:
    lora = load(shared / name)
    folder = shared / (peft_folder(name) or name)
    own_name = "derived_adapter_model" if "derived" in name else folder.name
    check_known(lora, PEFT[folder.relative_to(shared).as_posix()], own_name, "hf")
    parts = peft_tensors(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    seen = set()
    for weight, delta in lora.adapters.items():
        module = f"base_model.model.{weight.removesuffix('.weight')}"
        keys = [
            (f"{module}.lora_A.weight", f"{module}.lora_B.weight"),
            (f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"),
        ][delta.kind == "embedding"]
        a, b = (parts[key].numpy() for key in keys)
        rank = a.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        assert (delta.rank, delta.scaling) == (rank, scaling)
        np.testing.assert_array_equal(delta.a, a)
        np.testing.assert_array_equal(delta.b, b)
        if weight == PEFT[folder.relative_to(shared).as_posix()].sample[0]:
            expected = b.reshape(len(b), rank).astype(np.float64) @ a.reshape(rank, -1).astype(np.float64) * scaling
            close(delta.dense().reshape(expected.shape), expected)
        seen |= set(keys)
    for kind, values in lora.extras.items():
        ending = {"dora": ".lora_magnitude_vector", "modules_to_save": ""}[kind]
        for weight, factor in values.items():
            key = f"base_model.model.{weight.removesuffix('.weight') + ending if ending else weight}"
            np.testing.assert_array_equal(factor.array, parts[key].numpy())
            seen.add(key)
    assert seen == set(parts), "every tensor of the file is part of the adapter"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter_is_refused_with_the_reason(shared: Path, name: str) -> None:
    with pytest.raises(FormatError) as caught:
        load(shared / name)
    for words in REFUSED[name]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad_arch", "it is for architecture 'qwen2', the base is 'llama'"),
        ("bad_name", "weight blk.7.attn_q.weight is none of the base's 21 weights"),
        ("bad_shape", "weight blk.0.attn_q.weight is [64, 64] in the base, this adapter changes [64, 32]"),
        ("lora_a", None),
    ],
)
def test_what_only_the_base_can_show_is_found_beside_it(shared: Path, name: str, said: str | None) -> None:
    base = open_base(shared / "gguf_cases" / "base.gguf")
    assert misfits(load(shared / "gguf_cases" / f"{name}.gguf"), base) == ([said] if said else [])


def check_known(lora: LoadedLora, known: Adapter, name: str, naming: str) -> None:
    weight, scaling, shape = known.sample
    assert (lora.name, lora.naming) == (name, naming)
    assert (lora.num_adapters(), lora.rank, lora.file_alpha) == (known.weights, known.rank, known.alpha)
    assert lora.alpha == (known.alpha or known.rank)
    assert {delta.kind for delta in lora.adapters.values()} == known.kinds
    assert {kind: len(values) for kind, values in lora.extras.items()} == known.extras
    assert lora.adapters[weight].scaling == scaling
    assert lora.adapters[weight].dense().shape == shape


def peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_model.bin").exists():
        return torch.load(folder / "adapter_model.bin", weights_only=True, map_location="cpu")
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def close(ours: np.ndarray, expected: np.ndarray) -> None:
    # float32 products of ranks up to 16: a few units in the last place of the largest value
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * max(np.abs(expected).max(), 1e-30))
