"""Every pair of formats that can hold an adapter, there and back: the same updates, as the plain formula has them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack import LoadedLora, convert, load
from lorastack.base.known_paths import unet_originals
from lorastack.base.model import BaseModel
from lorastack.core.delta import LoraDelta
from lorastack.core.target import Naming
from lorastack.errors import NamingError

LLAMA = BaseModel(
    "llama",
    "hf",
    "LlamaForCausalLM",
    {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"},
    {
        f"model.layers.{n}.{name}.weight": shape
        for n in range(2)
        for name, shape in {
            "self_attn.q_proj": (16, 12),
            "self_attn.k_proj": (8, 12),
            "self_attn.o_proj": (12, 16),
            "mlp.gate_proj": (20, 12),
            "mlp.down_proj": (12, 20),
        }.items()
    },
)
IMAGE = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 6),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
    "unet.up_blocks.1.resnets.2.conv1.weight": (8, 4, 3, 3),
    "unet.mid_block.attentions.0.proj_in.weight": (8, 8, 1, 1),
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.weight": (6, 6),
}
ENDINGS = {"gguf": ".gguf", "kohya": ".safetensors", "diffusers": ".safetensors", "peft": "", "mlx": ""}


def random(shapes: dict[str, tuple[int, ...]], seed: int, naming: Naming = "hf", many: bool = True) -> LoadedLora:
    """An adapter with a rank and a scaling of its own at each weight."""
    rng = np.random.default_rng(seed)
    deltas = {}
    for name, (out, wide, *kernel) in shapes.items():
        rank = int(rng.integers(1, 6)) if many else 3
        scaling = float(rng.choice([0.25, 1.0, 1.7, -0.3])) if many else 0.5
        a = rng.standard_normal((rank, wide, *kernel)).astype(np.float32)
        b = rng.standard_normal((out, rank, *(1 for _ in kernel))).astype(np.float32)
        deltas[name] = LoraDelta(a, b, scaling, "conv" if kernel else "linear")
    return LoadedLora.from_tensors(deltas, name="random", naming=naming)


def dense(lora: LoadedLora) -> dict[str, np.ndarray]:
    """scaling * B @ A in float64."""
    found = {}
    for name, delta in lora.adapters.items():
        a, b = (np.asarray(part, np.float64) for part in (delta.a, delta.b))
        flat = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1) if a.ndim != 3 else b @ a
        found[name] = delta.scaling * flat
    return found


def differing(one: LoadedLora, other: LoadedLora) -> list[str]:
    """The weights whose updates are not the same to a millionth, or that only one of the two has."""
    wanted, found = dense(one), dense(other)
    both = wanted.keys() & found.keys()
    return sorted(wanted.keys() ^ found.keys()) + [
        name for name in both if not np.abs(found[name] - wanted[name]).max() <= 1e-6 * np.abs(wanted[name]).max()
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(["peft", "gguf", "mlx"]), min_size=1, max_size=4),
    st.booleans(),
)
def test_language_models(seed: int, ways: list[str], many: bool) -> None:
    start = random(dict(LLAMA.shapes), seed, many=many)
    with tempfile.TemporaryDirectory() as folder:
        lora = start
        for n, to in enumerate([*ways, "peft"]):
            before = lora.naming
            out = Path(folder) / f"{n}{ENDINGS[to]}"
            needs = LLAMA if "gguf" in (before, to) else None
            lora = load(convert(lora, out, to=to, base=needs))  # type: ignore[arg-type]
        assert differing(start, lora) == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(["kohya", "diffusers"]), min_size=1, max_size=4))
def test_image_models_without_a_base(seed: int, ways: list[str]) -> None:
    start = random(IMAGE, seed)
    with tempfile.TemporaryDirectory() as folder:
        lora = start
        for n, to in enumerate([*ways, "diffusers"]):
            out = Path(folder) / f"{n}{ENDINGS[to]}"
            lora = load(convert(lora, out, to=to))  # type: ignore[arg-type]
        assert differing(start, lora) == []


def test_a_peft_folder_is_of_one_model(tmp_path: Path) -> None:
    lora = random(IMAGE, 0)
    with pytest.raises(Exception, match=r"several models of a pipeline, unet, text_encoder"):
        convert(lora, tmp_path / "peft", to="peft")
    assert not any(tmp_path.iterdir())
    unet = lora.select("unet.*")
    back = load(convert(unet, tmp_path / "peft", to="peft"))
    assert differing(unet, back.with_weights_renamed({"": "unet"})) == []


@pytest.mark.parametrize("program", ["vllm", "sglang", "mlx-lm"])
def test_a_reader_with_one_scaling_for_all_gets_one(program: str, tmp_path: Path) -> None:
    lora = random(dict(LLAMA.shapes), 1)
    back = load(convert(lora, tmp_path / "out", target=program))
    assert differing(lora, back) == []
    assert len({delta.scaling for delta in back.adapters.values()}) == 1
    if program != "vllm":
        assert len({delta.rank for delta in back.adapters.values()}) == 1


FLUX = {
    f"transformer.{name}.weight": shape
    for name, shape in {
        "transformer_blocks.0.attn.to_q": (8, 8),
        "transformer_blocks.0.attn.to_k": (8, 8),
        "transformer_blocks.0.attn.to_v": (8, 8),
        "transformer_blocks.0.ff.net.0.proj": (32, 8),
        "single_transformer_blocks.3.attn.to_q": (8, 8),
        "single_transformer_blocks.3.attn.to_k": (8, 8),
        "single_transformer_blocks.3.attn.to_v": (8, 8),
        "single_transformer_blocks.3.proj_mlp": (32, 8),
        "norm_out.linear": (16, 8),
    }.items()
}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_what_is_one_tensor_in_a_models_own_code_is_one_again(seed: int, many: bool) -> None:
    start = random(FLUX, seed, many=many)
    base = BaseModel("flux", "hf", None, {}, FLUX)
    with tempfile.TemporaryDirectory() as folder:
        one = load(convert(start, Path(folder) / "one.safetensors", to="comfyui"))
        assert set(one.adapters) == {
            f"diffusion_model.{name}.weight"
            for name in (
                "double_blocks.0.img_attn.qkv",
                "double_blocks.0.img_mlp.0",
                "single_blocks.3.linear1",
                "final_layer.adaLN_modulation.1",
            )
        }
        assert differing(start, load(convert(one, Path(folder) / "two.safetensors", to="diffusers", base=base))) == []
        if not many:
            with pytest.raises(NamingError, match=r"give it as base="):  # Flux's or Stable Diffusion 3's
                convert(start.select("transformer.transformer_blocks*"), Path(folder) / "no.safetensors", to="comfyui")
            part = start.select("*to_[qv].weight")
            with pytest.raises(NamingError, match=r"what its own code calls it is not known"):
                convert(part, Path(folder) / "no.safetensors", to="comfyui")
            two = load(convert(part, Path(folder) / "part.safetensors", to="comfyui", base=base))
            back = load(convert(two, Path(folder) / "back.safetensors", to="diffusers", base=base))
            assert differing(part, back.select("*to_[qv].weight")) == []


def test_a_unet_goes_under_the_names_of_its_own_code_without_a_base(tmp_path: Path) -> None:
    start = random({name: shape for name, shape in IMAGE.items() if name.startswith("unet.")}, 5)
    one = load(convert(start, tmp_path / "one.safetensors", to="comfyui"))
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" in one.adapters
    base = BaseModel("sd", "hf", None, {}, {f"unet.{m}.weight": (8, 8) for m in set(unet_originals().values())} | IMAGE)
    assert differing(start, load(convert(one, tmp_path / "two.safetensors", to="diffusers", base=base))) == []


EXPERTS = {
    f"model.layers.{n}.mlp.experts.{e}.{layer}.weight": shape
    for n in range(2)
    for e in range(3)
    for layer, shape in {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10)}.items()
}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(["one by one", "fused", "mlx"]), min_size=1, max_size=4),
    st.booleans(),
)
def test_experts_in_every_layout(seed: int, layouts: list[str], many: bool) -> None:
    start = random(EXPERTS, seed, many=many)
    with tempfile.TemporaryDirectory() as folder:
        lora = start
        for n, layout in enumerate([*layouts, "one by one"]):
            experts = None if layout == "mlx" else layout
            to = "mlx" if layout == "mlx" else "peft"
            lora = load(convert(lora, Path(folder) / str(n), to=to, experts=experts))  # type: ignore[arg-type]
            assert any(name.endswith("experts.gate_up_proj") for name in lora.adapters) == (layout == "fused")
        assert differing(start, lora) == []
