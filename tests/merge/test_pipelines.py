"""Merging into image models: folders of diffusers and single-file checkpoints, held against diffusers' own fusing."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

from lorastack import LoadedLora, LoraStack
from lorastack.base import open_base
from lorastack.base.checkpoint import OriginalNames
from lorastack.cli import app
from lorastack.errors import ArgumentError, FormatError, NamingError, UnsupportedError
from lorastack.extracting import extract
from lorastack.merging import merge
from lorastack.torch import attach
from tests.originals import State, checkpoint
from tests.pipelines import PIPELINES, adapter, as_diffusers, picture, stable_diffusion, stable_diffusion_xl

PARTS = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
SCALES = {"one": 0.7, "two": -0.4}
TWO_HOMES = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")


def stack_for(pipe: Any, kind: str) -> LoraStack:
    one, two = adapter(pipe, PARTS[kind], 1), adapter(pipe, PARTS[kind], 2, rank=3, name="two")
    return LoraStack([(one, SCALES["one"]), (two, SCALES["two"])])


def fused(pipe: Any, stack: LoraStack) -> None:
    """What diffusers makes of it."""
    for lora, _ in stack.entries:
        pipe.load_lora_weights(as_diffusers(lora), adapter_name=lora.name)
    pipe.set_adapters(list(SCALES), list(SCALES.values()))
    pipe.fuse_lora(components=["unet", "text_encoder"], adapter_names=list(SCALES))
    pipe.unload_lora_weights()


def assert_same_numbers(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_folder_becomes_what_the_live_pipeline_computes_with(kind: str, tmp_path: Path) -> None:
    pipe = PIPELINES[kind]()
    pipe.save_pretrained(tmp_path / "base", max_shard_size="30KB" if kind == "flux" else "10GB")
    stack = stack_for(pipe, kind)
    done = merge(tmp_path / "base", stack, tmp_path / "new", verify=True, link=True)
    assert max(one.error for one in done.verified) < 1e-5
    assert done.left_out == ()
    before = {p.relative_to(tmp_path / "base"): p for p in (tmp_path / "base").rglob("*") if p.is_file()}
    after = {p.relative_to(tmp_path / "new"): p for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert set(after) == {*before, Path("README.md"), Path("lorastack_merge.toml")}
    for path in before:
        if path.suffix != ".safetensors" or path.parts[0] not in PARTS[kind]:
            assert before[path].read_bytes() == after[path].read_bytes(), path
        if path.parts[0] == "vae" and path.suffix == ".safetensors":
            assert before[path].stat().st_ino == after[path].stat().st_ino
    with attach(pipe, stack):
        wanted = picture(pipe)
    new = type(pipe).from_pretrained(tmp_path / "new")
    new.set_progress_bar_config(disable=True)
    assert np.abs(picture(new) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_folder_becomes_what_diffusers_fuses(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    stack = stack_for(pipe, "sd")
    merge(tmp_path / "base", stack, tmp_path / "new")
    fused(pipe, stack)
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        ours, theirs = load_file(tmp_path / "new" / part / f"{file}.safetensors"), getattr(pipe, part).state_dict()
        assert set(ours) == set(theirs)
        for name, wanted in theirs.items():
            assert_same_numbers(ours[name], wanted, name)


def header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)


@pytest.mark.parametrize(("kind", "make"), [("sd", stable_diffusion), ("sdxl", stable_diffusion_xl)])
def test_a_checkpoint_keeps_its_header_and_has_what_the_folder_has(kind: str, make: Any, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path / "folder")
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(checkpoint(pipe), old, metadata={"modelspec.title": "mine"})
    stack = stack_for(pipe, kind)
    done = merge(old, stack, new, verify=True)
    merge(tmp_path / "folder", stack, tmp_path / "merged")
    assert header_of(new) == header_of(old)
    assert len(done.survivals) == len({name for lora, _ in stack.entries for name in lora.adapters})

    wanted = checkpoint(type(pipe).from_pretrained(tmp_path / "merged"))
    found, before = load_file(new), load_file(old)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert sum("in_proj_weight" in name for name in changed) == (3 if kind == "sdxl" else 0)
    assert not any("vae" in name or name.startswith("first_stage_model") for name in changed)


def test_rows_of_a_tensor_that_holds_three_weights(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl()
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in checkpoint(pipe).items()}, old)
    rng = np.random.default_rng(0)
    layer = "text_encoder_2.text_model.encoder.layers.1.self_attn"
    tensors = {
        f"{layer}.{which}_proj.weight": (rng.standard_normal((2, 32)), rng.standard_normal((32, 2))) for which in "qv"
    }
    merge(old, LoadedLora.from_tensors(tensors, name="qv"), new, verify=True)
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    before, after = load_file(old)[key].double(), load_file(new)[key]
    wanted = before.clone()
    for first, which in ((0, "q"), (64, "v")):
        a, b = tensors[f"{layer}.{which}_proj.weight"]
        wanted[first : first + 32] += torch.from_numpy(b @ a)
    assert torch.equal(after, wanted.to(torch.bfloat16))
    assert torch.equal(after[32:64], before[32:64].to(torch.bfloat16))


def full_size(kind: str) -> tuple[Any, int]:
    """The real models, without numbers, as a pipeline has them."""
    from types import SimpleNamespace

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            layers_per_block=2,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        if kind == "sd":
            unet = UNet2DConditionModel(cross_attention_dim=768)
            return SimpleNamespace(unet=unet, vae=vae, text_encoder=clip), 1130
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
            )
        )
    return SimpleNamespace(unet=unet, vae=vae, text_encoder=clip, text_encoder_2=second), 2515


def write_header(state: State, path: Path) -> None:
    """A file of these shapes in float16, all zeros, which a file system need not store."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_tensor_of_a_full_size_checkpoint_has_its_name_and_shape(kind: str, tmp_path: Path) -> None:
    pipe, least = full_size(kind)
    with torch.device("meta"):
        state = checkpoint(pipe)
    # diffusers reads these names as we wrote them.
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(state), pipe.unet.config)
    assert {name: t.shape for name, t in theirs.items()} == {n: t.shape for n, t in pipe.unet.state_dict().items()}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(state), pipe.vae.config)
    assert {name: t.shape for name, t in theirs.items()} == {n: t.shape for n, t in pipe.vae.state_dict().items()}
    if kind == "sdxl":
        theirs = single_file_utils.convert_open_clip_checkpoint(
            pipe.text_encoder_2, dict(state), prefix="conditioner.embedders.1.model."
        )
        assert {n.removeprefix("text_model.") for n in theirs} == {
            n.removeprefix("text_model.") for n in pipe.text_encoder_2.state_dict()
        }
    path = tmp_path / "full.safetensors"
    write_header(state, path)
    base = open_base(path)
    live = {}
    for part in base.parts:
        for name, weight in getattr(pipe, part).named_parameters():
            inner = "text_model." if part.startswith("text") and not name.startswith("text_") else ""
            live[f"{part}.{inner}{name}"] = tuple(weight.shape)
    assert dict(base.shapes) == live
    assert len(live) >= least


def test_a_file_of_one_diffusers_model(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, ("unet",))
    for front in ("", "unet."):
        old, new = tmp_path / f"old{front}safetensors", tmp_path / f"new{front or '.'}safetensors"
        old = old.with_suffix(".safetensors")
        save_file({front + name: tensor.contiguous() for name, tensor in pipe.unet.state_dict().items()}, old)
        assert open_base(old).parts == (("unet",) if front else ())
        merge(old, lora, new)
        found = load_file(new)
        with attach(pipe.unet, lora) as handle:
            for name, delta in handle.stack.entries[0][0].adapters.items():
                a, b = (factor.take().astype(np.float64) for factor in delta.factors)
                before = pipe.unet.get_parameter(name).detach().double().numpy()
                change = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1) * delta.scaling
                wanted = before + change.reshape(before.shape)
                assert np.abs(found[front + name].numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_the_command_merges_into_a_checkpoint_and_takes_the_adapter_out_again(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, PARTS["sd"])
    lora.save(tmp_path / "one")
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(checkpoint(pipe), old)
    run = CliRunner().invoke
    words = ["merge", str(old), f"{tmp_path / 'one'}:0.5", "-o", str(new)]
    assert "would have" in (said := run(app, [*words, "--dry-run"])).output, said.output
    assert not new.exists()
    assert run(app, [*words, "--verify"]).exit_code == 0
    shown = run(app, ["inspect", str(tmp_path / "one"), "--base", str(old)])
    assert shown.exit_code == 0, shown.output
    assert run(app, [*words[:-1], str(tmp_path / "new")]).exit_code == 1
    back = extract(new, old, rank=4)
    assert set(back.adapters) == set(lora.adapters)
    for name, delta in lora.adapters.items():
        products = []
        for one, times in ((delta, 0.5), (back.adapters[name], 1.0)):
            a, b = (f.take().astype(np.float64).reshape(f.shape[0], -1) for f in one.factors)
            products.append(times * one.scaling * b @ a)
        assert np.abs(products[0] - products[1]).max() < 1e-4, name


def test_what_a_checkpoint_keeps_otherwise_is_compared_as_the_weight_that_it_is(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl()
    state = checkpoint(pipe)
    front = "conditioner.embedders.1.model."
    changed = {f"{front}text_projection": torch.ones(32, 32) / 32}
    bias = f"{front}transformer.resblocks.0.attn.in_proj_bias"
    changed[bias] = torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(32)])
    attention = "first_stage_model.encoder.mid.attn_1.q.weight"
    changed[attention] = torch.outer(torch.arange(16.0), torch.ones(16))[..., None, None]
    save_file(state, tmp_path / "old.safetensors")
    save_file({k: v + changed[k] if k in changed else v for k, v in state.items()}, tmp_path / "new.safetensors")
    found = extract(tmp_path / "new.safetensors", tmp_path / "old.safetensors", rank=1, save_rest=True)
    text = "text_encoder_2.text_projection.weight"
    wanted = {
        text: np.ones((32, 32)) / 32,
        "vae.encoder.mid_block.attentions.0.to_q.weight": np.outer(range(16), [1] * 16),
    }
    assert set(found.adapters) == set(wanted)
    for name, change in wanted.items():
        delta = found.adapters[name]
        assert np.abs(delta.scaling * delta.b @ delta.a - change).max() < 1e-5, name
    (biases,) = found.extras.values()
    (name,) = biases
    assert name == "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj.bias"
    assert np.abs(biases[name].take() - (state[bias][32:64].numpy() + 1)).max() < 1e-6


def test_what_cannot_be_a_base_or_merged_into_is_refused_by_name(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl()
    state = checkpoint(pipe)
    lora = adapter(pipe, ("unet",))
    path, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"

    def refused(tensors: State, error: type[Exception], match: str, what: LoadedLora = lora) -> None:
        save_file(tensors, path)
        with pytest.raises(error, match=match):
            merge(path, what, out)
        assert not out.exists()

    packed = {k: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for k, v in state.items()}
    refused(
        packed, UnsupportedError, r"keeps \d+ tensors such as .* in fp8, which cannot be merged into; merge into the 16"
    )
    refused({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1)}, UnsupportedError, "the original names of Flux")
    refused({"layers.0.weight": torch.zeros(3, 1)}, FormatError, "such as 'layers.0.weight', are neither a Stable")
    refused({"unet.a.lora_A.weight": torch.zeros(3, 1)}, FormatError, "it is an adapter")
    odd = {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(4, 2)}
    refused(odd, FormatError, r"in_proj_weight is \[4, 2\], expected q, k and v side by side")
    twice = {f"{front}text_model.final_layer_norm.bias": torch.zeros(2) for front in TWO_HOMES}
    refused(twice, FormatError, "and another are both text_encoder.text_model.final_layer_norm.bias")
    name = "text_encoder_2.text_projection.weight"
    turned = LoadedLora.from_tensors({name: (np.ones((1, 32)), np.ones((32, 1)))})
    refused(state, UnsupportedError, f"weight {name} is none of the files' own", turned)
    wrong = LoadedLora.from_tensors({"text_encoder_3.shared.weight": (np.ones((1, 32)), np.ones((32, 1)))})
    refused(state, NamingError, "1 weight is of text_encoder_3, which is no part of StableDiffusionXLPipeline", wrong)
    save_file(state, path)
    with pytest.raises(ArgumentError, match="so is what it is merged to: give NAME"):
        merge(path, lora, tmp_path / "folder")


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    index = tmp_path / "base/model_index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps({**said, "../x": ["a", "b"], "gone": ["diffusers", "X"]}))
    with pytest.raises(FormatError) as caught:
        open_base(tmp_path / "base")
    assert len(caught.value.problems) == 2
    index.write_text(json.dumps(said))
    for other in ("scheduler", "tokenizer"):  # of a hub id they are not fetched
        shutil.rmtree(tmp_path / "base" / other)
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert len(open_base(tmp_path / "base").parts) == 3
    weights.with_name("diffusion_pytorch_model.non_ema.safetensors").write_bytes(
        weights.with_name("diffusion_pytorch_model.fp16.safetensors").read_bytes()
    )
    with pytest.raises(FormatError, match="leave one variant of its weights in the folder"):
        open_base(tmp_path / "base")


def test_a_model_in_another_form_is_carried_along(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    checker = tmp_path / "base/safety_checker"
    checker.mkdir()
    (checker / "config.json").write_text("{}")
    (checker / "pytorch_model.bin").write_bytes(b"weights")
    (tmp_path / "base/unet/diffusion_pytorch_model.bin").write_bytes(b"old weights")
    (tmp_path / "base/v1-5.safetensors").write_bytes(b"old weights")
    index = tmp_path / "base/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "safety_checker": ["stable_diffusion", "S"]}))
    done = merge(tmp_path / "base", adapter(pipe, ("unet",)), tmp_path / "new")
    assert (tmp_path / "new/safety_checker/pytorch_model.bin").read_bytes() == b"weights"
    assert sorted(path.name for path in done.left_out) == ["diffusion_pytorch_model.bin", "v1-5.safetensors"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_odd_names_in_a_checkpoint_are_no_weights_and_no_crash(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(KEYS))
    parts = key.split(".")
    at = data.draw(st.integers(0, len(parts)))
    odd = data.draw(st.sampled_from(["", "0", "99999", "x", "weight"]))
    cut = data.draw(st.booleans())
    changed = ".".join([*parts[:at], odd, *parts[at + cut :]]) if at else ".".join(parts[:-1])
    for piece in OriginalNames([key, changed]).pieces(changed):
        assert piece.name.partition(".")[0] in ("unet", "vae", "text_encoder", "text_encoder_2")


def test_a_first_block_that_is_no_convolution_is_no_weight() -> None:
    odd = "model.diffusion_model.input_blocks.0.0.op.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    names = OriginalNames([odd, first])
    assert list(names.pieces(odd)) == []
    assert [piece.name for piece in names.pieces(first)] == ["unet.conv_in.weight"]


with torch.device("meta"):
    KEYS = sorted({re.sub(r"\d+", "1", key): key for key in checkpoint(stable_diffusion_xl())}.values())


@pytest.mark.parametrize("front", ["", "text_model."])
def test_a_text_encoders_names_fit_folders_of_older_and_newer_saves(front: str, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, ("text_encoder",))
    flat = LoadedLora.from_tensors(
        {n.replace("text_model.", ""): tuple(f.take() for f in d.factors) for n, d in lora.adapters.items()}, alpha=2
    )
    pipe.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/text_encoder/model.safetensors"
    before = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file({front + name: tensor for name, tensor in before.items()}, path, metadata={"format": "pt"})
    found = []
    for n, one in enumerate((lora, flat)):
        done = merge(tmp_path / "base", one, tmp_path / f"new{n}", verify=True)
        assert done.changed == len(lora.adapters)
        found.append(load_file(tmp_path / f"new{n}/text_encoder/model.safetensors"))
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in found[n].items())
    name = "encoder.layers.1.mlp.fc1.weight"
    delta = lora.adapters[f"text_encoder.text_model.{name}"]
    a, b = (factor.take().astype(np.float64) for factor in delta.factors)
    wanted = before[name].double() + torch.from_numpy(delta.scaling * b @ a)
    assert_same_numbers(found[0][front + name].double(), wanted, name)
