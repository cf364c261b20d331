"""What is written reads back as the same update, and diffusers and PEFT compute the same with it."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from lorastack import LoadedLora, load, save
from lorastack.base import convert_names
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.core.kronecker import Kronecker
from lorastack.errors import ArgumentError, FormatError
from tests.formats.images import base_of, modules_of

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TEXT = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TARGETS = ("to_q", "to_out.0", "proj_in", "conv1", "ff.net.2", "q_proj", "fc1")


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(3)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=None,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parts_of(pipe: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def adapter(
    pipe: StableDiffusionPipeline, seed: int, scalings: Any, dora: bool = False, rank: int | None = None
) -> LoadedLora:
    """An adapter of every kind of layer in the pipeline, each with a rank and a scaling of its own."""
    rng = np.random.default_rng(seed)
    deltas, magnitudes, numbers = {}, {}, itertools.cycle(scalings)
    for part, model in parts_of(pipe).items():
        for name, module in modules_of(model).items():
            if not name.endswith(TARGETS):
                continue
            weight = f"{part}.{name}.weight"
            shape, own_rank = tuple(module.weight.shape), rank or int(rng.integers(1, 5))
            a = rng.normal(size=(own_rank, *shape[1:])).astype(np.float32)
            b = rng.normal(size=(shape[0], own_rank, *(1 for _ in shape[2:]))).astype(np.float32) * 0.1
            deltas[weight] = LoraDelta(a, b, next(numbers), "conv" if len(shape) > 2 else "linear")
            norms = np.linalg.norm(module.weight.detach().numpy().reshape(shape[0], -1), axis=1)
            own = (norms * rng.uniform(0.8, 1.2, shape[0])).astype(np.float32)
            magnitudes[weight] = Factor.of(own if len(shape) == 2 else own.reshape(1, -1, 1, 1), weight)
    from dataclasses import replace

    lora = LoadedLora.from_tensors(deltas, name=f"a{seed}", naming="hf")
    return replace(lora, extras={"dora": magnitudes}) if dora else lora


def merged(lora: LoadedLora, weight: str, own: np.ndarray, scale: float = 1.0) -> np.ndarray:
    delta = lora.adapters[weight]
    whole = own.reshape(own.shape[0], -1).astype(np.float64) + scale * delta.dense().reshape(own.shape[0], -1)
    if magnitudes := lora.extras.get("dora"):
        whole *= (magnitudes[weight].array.reshape(-1) / np.linalg.norm(whole, axis=1))[:, None]
    return whole.reshape(own.shape)


@pytest.mark.parametrize("scalings", [[1.0], [0.5], [0.25, 2.0, -1.5], [1 / math.sqrt(3), 0.7]])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_diffusers_computes_what_we_do_with_what_we_write(
    tmp_path: Path, scalings: list[float], dora: bool, folder: bool
) -> None:
    pipe = pipeline()
    own = {f"{p}.{n}": v.detach().clone().numpy() for p, m in parts_of(pipe).items() for n, v in m.named_parameters()}
    lora = adapter(pipe, 1, scalings, dora)
    path = save(lora, tmp_path / ("one" if folder else "one.safetensors"), format="diffusers")
    back = load(path)
    assert back.naming == "hf"
    pipe.load_lora_weights(str(path) if folder else str(path.parent), weight_name=None if folder else path.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for part, model in parts_of(pipe).items():
        for name, value in model.named_parameters():
            weight = f"{part}.{name}"
            expected = merged(lora, weight, own[weight]) if weight in lora.adapters else own[weight]
            np.testing.assert_allclose(value.detach().numpy(), expected, atol=1e-5, err_msg=weight)
            if weight in lora.adapters:
                np.testing.assert_allclose(merged(back, weight, own[weight]), expected, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_two_adapters_in_diffusers_are_the_sum_of_both(tmp_path: Path, several: bool) -> None:
    """`set_adapters` with weights, of one of ours and one that diffusers wrote."""
    pipe = pipeline()
    own = {f"unet.{n}": v.detach().clone().numpy() for n, v in pipe.unet.named_parameters()}
    loras = {"a": adapter(pipe, 1, [0.5]), "b": adapter(pipe, 2, [1.0, 0.3] if several else [1.0])}
    for name, lora in loras.items():
        save(lora, tmp_path / f"{name}.safetensors", format="diffusers")
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    pipe.fuse_lora(adapter_names=["a", "b"])
    pipe.unload_lora_weights()
    for name, value in pipe.unet.named_parameters():
        weight = f"unet.{name}"
        expected = own[weight].astype(np.float64)
        for scale, lora in zip((0.7, -0.4), loras.values(), strict=True):
            if weight in lora.adapters:
                expected = expected + scale * lora.adapters[weight].dense()
        np.testing.assert_allclose(value.detach().numpy(), expected, atol=1e-5)


def test_a_kohya_file_is_what_diffusers_writes_as_one_and_reads_as_the_same(tmp_path: Path) -> None:
    pipe = pipeline()
    own = {f"unet.{n}": v.detach().clone().numpy() for n, v in pipe.unet.named_parameters()}
    lora = adapter(pipe, 4, [0.5], rank=3)  # diffusers loses alphas of kohya files that differ
    save(lora, tmp_path / "k.safetensors", format="kohya")
    ours = load_file(tmp_path / "k.safetensors")
    back = load(tmp_path / "k.safetensors")
    assert back.naming == "kohya"
    assert differing(convert_names(back, base_of(parts_of(pipe)), "hf"), lora) == []
    # diffusers' old converter knows attention, feed-forward and projections of a UNet, and no convolution of a resnet.
    state = {k: v for k, v in ours.items() if "conv1" not in k}
    pipe.load_lora_weights({k: v.clone() for k, v in state.items()})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, value in pipe.unet.named_parameters():
        weight = f"unet.{name}"
        expected = (
            merged(lora, weight, own[weight]) if weight in lora.adapters and "conv1" not in weight else own[weight]
        )
        np.testing.assert_allclose(value.detach().numpy(), expected, atol=1e-5, err_msg=weight)


def differing(got: LoadedLora, expected: LoadedLora, rtol: float = 1e-6) -> list[str]:
    """The weights and the extras that are not the same, or that only one of the two has."""
    found = sorted(set(got.adapters) ^ set(expected.adapters))
    for name in set(got.adapters) & set(expected.adapters):
        one, other = got.adapters[name].dense(), expected.adapters[name].dense()
        close = one.shape == other.shape and np.abs(one - other).max() <= rtol * max(np.abs(other).max(), 1e-30)
        found += [] if close else [name]
    for kind in ("dora", "diff", "diff_b", "lora_bias"):
        ours, theirs = got.extras.get(kind, {}), expected.extras.get(kind, {})
        found += sorted(set(ours) ^ set(theirs))
        found += [
            f"{kind} {name}"
            for name in set(ours) & set(theirs)
            if not np.array_equal(ours[name].array.reshape(-1), theirs[name].array.reshape(-1))
        ]
    return found


SHAPES = {"linear": [(5, 7), (1, 3), (16, 4)], "conv": [(5, 7, 3, 3), (4, 2, 1, 1), (2, 3, 1, 3)]}


@st.composite
def loras(draw: Any, kinds: tuple[str, ...], names: Any) -> LoadedLora:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    deltas = {}
    for n in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(kinds))
        shape = draw(st.sampled_from(SHAPES[kind]))
        rank = draw(st.integers(1, 6))
        scaling = draw(st.sampled_from([1.0, 0.5, 0.0, -2.0, 1 / 3, 1e-3, 1e-42, 7e5]))
        dtype = draw(st.sampled_from([np.float32, np.float16]))
        a = rng.normal(size=(rank, *shape[1:])).astype(dtype)
        b = rng.normal(size=(shape[0], rank, *(1 for _ in shape[2:]))).astype(dtype)
        deltas[names(n)] = LoraDelta(a, b, scaling, kind)  # type: ignore[arg-type]
    return LoadedLora.from_tensors(deltas, name="h", naming="kohya" if "." not in names(0) else "hf")


FORMATS = {
    "kohya": (("linear", "conv"), lambda n: f"lora_unet_blocks_{n}_to_q", "x.safetensors"),
    "comfyui": (("linear", "conv"), lambda n: f"diffusion_model.blocks.{n}.to_q.weight", "x.safetensors"),
    "diffusers": (("linear", "conv"), lambda n: f"unet.down_blocks.{n}.to_q.weight", "x.safetensors"),
    "mlx": (("linear",), lambda n: f"model.layers.{n}.self_attn.q_proj.weight", "x"),
    "peft": (("linear", "conv"), lambda n: f"model.layers.{n}.self_attn.q_proj.weight", "x"),
}


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_written_reads_back_as_the_same_update(format: str, data: Any) -> None:
    kinds, names, place = FORMATS[format]
    lora = data.draw(loras(kinds, names))
    with tempfile.TemporaryDirectory() as folder:
        path = save(lora, Path(folder) / place, format=format, dtype="f32")  # type: ignore[arg-type]
        assert differing(load(path), lora, 2e-6) == []


@pytest.mark.parametrize("one", ["kohya", "comfyui", "diffusers", "mlx", "peft"])
def test_an_adapter_goes_back_to_the_format_it_came_from(tmp_path: Path, one: str) -> None:
    _, names, place = FORMATS[one]
    rng = np.random.default_rng(0)
    pairs = {names(n): (rng.normal(size=(2, 6)), rng.normal(size=(4, 2))) for n in range(2)}
    lora = LoadedLora.from_tensors(pairs, alpha=3, naming="kohya" if one == "kohya" else "hf")
    first = load(save(lora, tmp_path / place, format=one))  # type: ignore[arg-type]
    (tmp_path / "again").mkdir()
    if place.endswith(".safetensors"):
        second = load(save(first, tmp_path / "again" / place))
        assert differing(second, lora) == []
        assert second.metadata["lorastack.format"] == first.metadata["lorastack.format"]
        with pytest.raises(ArgumentError, match="say which with format="):
            save(lora, tmp_path / "other.safetensors")


def full() -> LoadedLora:
    """An adapter of everything that kohya's format has beside pairs."""
    from dataclasses import replace

    rng = np.random.default_rng(1)

    def factor(*shape: int) -> Factor:
        return Factor.of(rng.normal(size=shape).astype(np.float32), "x")

    pairs = {f"lora_unet_{n}": (rng.normal(size=(2, 6)), rng.normal(size=(4, 2))) for n in "ab"}
    lora = LoadedLora.from_tensors(pairs, alpha=3, naming="kohya", name="full")
    extras = {
        "dora": {"lora_unet_a": factor(4)},
        "diff": {"lora_unet_c": factor(4, 6)},
        "diff_b": {"lora_unet_c.bias": factor(4), "lora_unet_a.bias": factor(4)},
        "lokr": {"lora_unet_d": Kronecker(factor(2, 3), factor(2, 2), 0.5)},
    }
    return replace(lora, extras=extras)


def test_extras_of_kohya_files_are_kept(tmp_path: Path) -> None:
    lora = full()
    back = load(save(lora, tmp_path / "x.safetensors", format="kohya"))
    assert differing(back, lora) == []
    one, other = back.extras["lokr"]["lora_unet_d"], lora.extras["lokr"]["lora_unet_d"]
    np.testing.assert_allclose(one.rows(0, 4), other.rows(0, 4), rtol=1e-6)


REFUSED = {
    "comfyui": ["weight 'lora_unet_a'", "weight 'lora_unet_b'", "weight 'lora_unet_c'", "weight 'lora_unet_d'"],
    "diffusers": ["weight 'lora_unet_a'", "weight 'lora_unet_b'", "dora: 1 of 0", "diff:", "diff_b:", "lokr:"],
    "mlx": ["its weights have kohya names", "weight 'lora_unet_a'", "weight 'lora_unet_b'", "dora: 1 of 2", "diff:",
            "diff_b:", "lokr:"],
    "peft": ["its weights have kohya names", "lokr:", "diff:", "diff_b:", "diff_b:"],
    "gguf": ["its weights do not have GGUF names", "the base's architecture", "dora:", "diff:", "diff_b:", "lokr:"],
}  # fmt: skip


@pytest.mark.parametrize("format", REFUSED)
def test_a_format_lists_everything_that_it_cannot_hold_and_writes_nothing(tmp_path: Path, format: str) -> None:
    ending = ".gguf" if format == "gguf" else "" if format in ("peft", "mlx") else ".safetensors"
    with pytest.raises(FormatError) as caught:
        save(full(), tmp_path / f"x{ending}", format=format)  # type: ignore[arg-type]
    lines = list(caught.value.problems)
    assert len(lines) == len(REFUSED[format]), lines
    for said in REFUSED[format]:
        assert any(line.startswith(said) for line in lines), (said, lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("x.gguf", "kohya", "written as NAME.safetensors"),
        ("x", "kohya", "written as NAME.safetensors"),
        ("x.safetensors", "mlx", "written as a folder"),
        ("x.safetensors", "gguf", "written as NAME.gguf"),
        ("x", "nothing", "there is no format 'nothing'"),
    ],
)
def test_a_format_has_its_ending(tmp_path: Path, name: str, format: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        save(full(), tmp_path / name, format=format)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_live_model_computes_what_diffusers_does(tmp_path: Path, format: Any) -> None:
    """One file on the UNet by itself, with ours and with `load_lora_weights`."""
    from lorastack import LoraStack
    from lorastack.torch import attach

    torch.manual_seed(0)
    pipe, x = pipeline(), (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 12))
    lora = adapter(pipe, 5, [0.5, -1.5, 0.3]).select("unet.*")
    path = save(lora, tmp_path / "x.safetensors", format=format)
    with torch.no_grad():
        plain = pipe.unet(*x).sample
        with attach(pipe.unet, LoraStack([(load(path), 0.8)])):
            got = pipe.unet(*x).sample
        assert torch.equal(pipe.unet(*x).sample, plain)
        theirs = save(lora, tmp_path / "d.safetensors", format="diffusers")
        pipe.load_lora_weights(str(tmp_path), weight_name=theirs.name, adapter_name="x")
        pipe.set_adapters(["x"], [0.8])
        expected = pipe.unet(*x).sample
    assert (got - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
