"""Stacks on diffusers pipelines, held against diffusers' own loading of the same adapters."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from lorastack import LoadedLora, LoraStack, block_weights, load
from lorastack.errors import ArgumentError, UnknownNameError, UnsupportedError
from lorastack.torch import attach, detach, merge_into
from tests.pipelines import PIPELINES, adapter, as_diffusers, picture, stable_diffusion, stable_diffusion_xl, unet

PARTS = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
SCALES = {"one": 0.7, "two": -0.4}


def two_adapters(pipe: Any, parts: tuple[str, ...], size: float = 0.1) -> LoraStack:
    one = adapter(pipe, parts, 1, size=size)
    two = adapter(pipe, parts, 2, rank=3, size=size, name="two")
    return LoraStack([(one, SCALES["one"]), (two, SCALES["two"])])


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_makes_what_diffusers_makes_of_two_adapters(kind: str) -> None:
    pipe = PIPELINES[kind]()
    before = picture(pipe)
    stack = two_adapters(pipe, PARTS[kind], 0.4 if kind == "flux" else 0.1)
    with attach(pipe, stack) as handle:
        ours = picture(pipe)
        assert not handle.unused()
        assert {layer.kind for layer in handle._layers.values()} <= {"linear", "conv"}
        assert {name.partition(".")[0] for name in handle.report.matched["two"]} == set(PARTS[kind])
    assert np.array_equal(picture(pipe), before)

    merged = merge_into(pipe, stack)
    assert_close(picture(pipe), ours)
    merged.undo()
    assert np.array_equal(picture(pipe), before)

    for lora, _ in stack.entries:
        pipe.load_lora_weights(as_diffusers(lora), adapter_name=lora.name)
    pipe.set_adapters(list(SCALES), list(SCALES.values()))
    theirs = picture(pipe)
    assert np.abs(theirs - before).max() > 0.1
    assert_close(ours, theirs)


def test_scales_push_and_remove_on_a_pipeline() -> None:
    pipe = stable_diffusion()
    before = picture(pipe)
    stack = two_adapters(pipe, PARTS["sd"])
    handle = attach(pipe, stack.entries[0][0])
    one = picture(pipe)
    handle.push(stack.entries[1][0], 0.5)
    both = picture(pipe)
    assert np.abs(both - one).max() > 0.1
    handle.set_scales({"one": 0.0, "two": 0.0})
    assert np.array_equal(picture(pipe), before)
    handle.set_scale("one", 1.0)
    handle.remove("two")
    assert np.array_equal(picture(pipe), one)
    with pytest.raises(UnsupportedError, match=r"cannot tell the rows of a Stable"), handle.rows([{}]):
        pass
    with pytest.raises(ArgumentError, match="has a stack attached already"):
        attach(pipe, stack)
    with pytest.raises(ArgumentError, match="has a stack attached already"):
        attach(pipe.unet, stack.entries[0][0].select("unet.*"))
    detach(pipe)
    assert not handle.attached
    assert np.array_equal(picture(pipe), before)
    empty = attach(pipe, LoraStack())
    with pytest.raises(ArgumentError, match="has a stack attached already"):
        attach(pipe, stack)
    empty.detach()


@pytest.mark.parametrize("front", ["unet.", ""])
def test_the_model_of_a_pipeline_takes_names_with_and_without_its_front(front: str) -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, ("unet",))
    with attach(pipe, lora):
        wanted = picture(pipe)
    bare = LoadedLora.from_tensors(
        {name.replace("unet.", front, 1): tuple(f.take() for f in d.factors) for name, d in lora.adapters.items()},
        alpha=2,
    )
    with attach(pipe.unet, bare):
        assert np.array_equal(picture(pipe), wanted)
    with attach(pipe, bare):
        assert np.array_equal(picture(pipe), wanted)


def test_a_text_encoder_by_itself() -> None:
    pipe = stable_diffusion_xl()
    lora = adapter(pipe, ("text_encoder_2",))
    with attach(pipe, lora):
        wanted = picture(pipe)
    with attach(pipe.text_encoder_2, lora):
        assert np.array_equal(picture(pipe), wanted)


def test_weights_of_another_part_are_named_with_the_way_out() -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, ("unet", "text_encoder"))
    count = sum(name.startswith("text_encoder") for name in lora.adapters)
    with pytest.raises(UnsupportedError) as caught:
        attach(pipe.unet, lora)
    assert caught.value.problems == (
        f"one: {count} weights are of text_encoder, which is no part of UNet2DConditionModel; give the pipeline that "
        "has it, or leave them out with select('unet.*')",
    )
    with attach(pipe.unet, lora.select("unet.*")):
        pass
    xl = adapter(stable_diffusion_xl(), ("text_encoder_2",))
    with pytest.raises(UnsupportedError, match="are of text_encoder_2, which is no part of StableDiffusionPipeline"):
        attach(pipe, xl)
    with attach(pipe.unet, lora, allow_partial=True) as handle:
        assert f"{count} weights are of text_encoder" in str(handle.report)


def test_what_is_neither_module_nor_pipeline_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"dict is no torch.nn.Module, and no pipeline"):
        attach({}, LoraStack())


def test_a_compiled_unet() -> None:
    small = {"block_out_channels": (16,), "layers_per_block": 1}
    small |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = unet(**small, mid_block_type=None)
    lora = adapter(SimpleNamespace(unet=model), ("unet",))
    given = (torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 32))

    def passed(live: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return live(*given).sample.numpy()

    with attach(model, lora) as handle:
        wanted = passed(model)
        handle.set_scale("one", 0.5)
        half = passed(model)
    compiled = torch.compile(model, backend="eager")
    with attach(compiled, lora) as handle:
        assert_close(passed(compiled), wanted)
        handle.set_scale("one", 0.5)
        assert_close(passed(compiled), half)
    assert np.abs(half - wanted).max() > 0.1


def test_a_part_that_was_replaced_is_noticed() -> None:
    pipe = stable_diffusion()
    lora = adapter(pipe, ("unet",))
    handle = attach(pipe, lora)
    pipe.unet = stable_diffusion(1).unet
    with pytest.raises(UnsupportedError, match="modules were replaced since"):
        handle.push(adapter(pipe, ("unet",), 2, name="two"))
    handle.detach()
    with pytest.raises(ArgumentError, match="detached"):
        handle.set_scale("one", 1.0)


def fading(step: int) -> float:
    return 1.0 - 0.6 * step


def growing(step: int) -> float:
    return -0.2 + 0.3 * step * step


def test_a_schedule_sets_scales_between_steps_as_diffusers_does_by_hand() -> None:
    pipe = stable_diffusion()
    one, two = adapter(pipe, ("unet",), 1), adapter(pipe, ("unet",), 2, name="two")
    handle = attach(pipe, LoraStack([(one, 0.3), (two, 0.8)]))
    before = picture(pipe)
    callback = handle.schedule({"one": fading, "two": growing})
    assert handle.scales == {"one": fading(0), "two": growing(0)}
    ours = picture(pipe, callback_on_step_end=callback)
    assert handle.scales == {"one": 0.3, "two": 0.8}
    assert np.array_equal(picture(pipe), before)
    with pytest.raises(ArgumentError, match=r"this schedule ended with the pipeline's last step"):
        picture(pipe, callback_on_step_end=callback)

    with handle.schedule({"one": fading, "two": growing}) as callback:
        assert np.array_equal(picture(pipe, callback_on_step_end=callback), ours)
        assert np.array_equal(picture(pipe, callback_on_step_end=callback), ours)
        with pytest.raises(ArgumentError, match="a schedule sets the scale of one at each step until it ends"):
            handle.set_scale("one", 0.0)
        with pytest.raises(ArgumentError, match="another schedule sets scales still"):
            handle.schedule({"one": fading})
    assert handle.scales == {"one": 0.3, "two": 0.8}
    handle.detach()

    def by_hand(live: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        live.set_adapters(["one", "two"], [fading(step + 1), growing(step + 1)])
        return kwargs

    for lora in (one, two):
        pipe.load_lora_weights(as_diffusers(lora), adapter_name=lora.name)
    pipe.set_adapters(["one", "two"], [fading(0), growing(0)])
    assert_close(ours, picture(pipe, callback_on_step_end=by_hand))


def test_a_broken_schedule_leaves_the_scales_as_they_were() -> None:
    pipe = stable_diffusion()
    handle = attach(pipe, adapter(pipe, ("unet",)))

    def broken(step: int) -> float:
        return 1 / (1 - step)

    with pytest.raises(ZeroDivisionError):
        picture(pipe, callback_on_step_end=handle.schedule({"one": broken}))
    assert handle.scales == {"one": 1.0}
    with pytest.raises(UnknownNameError, match="no adapter is named 'eno'; attached are one"):
        handle.schedule({"eno": fading})
    with pytest.raises(ArgumentError, match="a scale is a finite number"):
        handle.schedule({"one": lambda step: float("nan")})
    assert handle.scales == {"one": 1.0}
    with handle.schedule({"one": fading}) as callback, pytest.raises(ArgumentError, match="expected 0"):
        callback(pipe, 2, None, {})
    with pytest.raises(ArgumentError, match=r"does not say how many steps it takes \(num_timesteps\)"):
        handle.schedule({"one": fading})(SimpleNamespace(), 0, None, {})
    assert handle.scales == {"one": 1.0}


def test_another_thread_does_not_get_a_schedules_scales() -> None:
    pipe = stable_diffusion()
    handle = attach(pipe, adapter(pipe, ("unet",)))
    told: list[BaseException] = []

    def other() -> None:
        try:
            with handle.plain():
                picture(pipe)
        except ArgumentError as error:
            told.append(error)

    with handle.schedule({"one": fading}):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "a schedule of another thread sets the scales step by step" in str(told[0])
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(told) == 1


def test_a_text_encoders_adapter_is_not_taken_for_a_vision_models() -> None:
    lora = adapter(stable_diffusion(), ("text_encoder",)).with_weights_renamed({"text_encoder": ""})
    assert all(name.startswith("text_model.encoder.layers") for name in lora.adapters)
    layers = SimpleNamespace(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3)
    vision = CLIPVisionModel(CLIPVisionConfig(**vars(layers), image_size=16, patch_size=8))
    with pytest.raises(UnsupportedError):
        attach(vision, lora)
    with attach(stable_diffusion().text_encoder, lora):
        pass


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_kohya_file_gives_the_picture_of_the_same_adapter_under_live_names(kind: str, tmp_path: Path) -> None:
    pipe = PIPELINES[kind]()
    lora = adapter(pipe, PARTS[kind], size=0.3)
    with attach(pipe, lora):
        wanted = picture(pipe)
    fronts = {"text_encoder": "lora_te" if kind == "sd" else "lora_te1", "text_encoder_2": "lora_te2"}
    fronts |= {"unet": "lora_unet", "transformer": "lora_transformer"}
    state = {}
    for name, delta in lora.adapters.items():
        part, _, path = name.removesuffix(".weight").partition(".")
        key = f"{fronts[part]}_{path.replace('.', '_')}"
        for which, factor in zip(("down", "up"), delta.factors, strict=True):
            state[f"{key}.lora_{which}.weight"] = torch.from_numpy(factor.take().copy())
        state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "ink.safetensors")
    ink = load(tmp_path / "ink.safetensors")
    with attach(pipe, ink) as handle:
        assert np.array_equal(picture(pipe), wanted)
        assert not handle.unused()
    if kind == "sd":
        with pytest.raises(UnsupportedError, match=r"6 weights are of text_encoder, .* select\('lora_unet_\*'\)"):
            attach(pipe.unet, ink)
        with attach(pipe.unet, ink.select("lora_unet_*").scaled(block_weights(ink.select("lora_unet_*"), "INALL"))):
            pass
