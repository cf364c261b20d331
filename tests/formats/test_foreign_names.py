"""Names of other programs for a base's weights, against diffusers' own converters on full-size models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file

from lorastack import LoadedLora, load
from lorastack.base import convert_names
from lorastack.base.foreign import ForeignNames
from lorastack.base.model import BaseModel
from lorastack.base.originals import originals
from lorastack.base.settle import settle
from lorastack.errors import NamingError
from tests.formats.images import base_of, full_size, modules_of


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("front", ["unet.", ""])
def test_block_names_of_a_unets_own_code_are_those_that_diffusers_knows(kind: str, front: str) -> None:
    unet = full_size(kind)["unet"]
    ours = {places[0]: own for own, places in originals([name for name, _ in unet.named_modules()])}
    modules = modules_of(unet)
    assert set(ours) >= set(modules)
    checkpoint = {
        f"model.diffusion_model.{ours[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": key
        for key in unet.state_dict()
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert converted == {key: key for key in unet.state_dict()}
    flat = {f"lora_unet_{ours[module].replace('.', '_')}": module for module in modules}
    if kind == "sdxl":  # which is what files of kohya have these names for
        state = {f"{name}.lora_{part}.weight": module for name, module in flat.items() for part in ("down", "up")}
        state = theirs._maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
        state = convert_unet_state_dict_to_peft(theirs._convert_non_diffusers_lora_to_diffusers(state)[0])
        assert {key.split(".lora_")[0]: module for key, module in state.items()} == {f"unet.{m}": m for m in modules}
    names = ForeignNames(base_of({front.rstrip("."): unet}).shapes)
    for name, module in flat.items():
        assert names.find(name)[0].weight == f"{front}{module}.weight"
        assert names.find(f"diffusion_model.{ours[module]}.weight") == names.find(name)
        own = names.kohya(f"{front}{module}.weight")
        assert own == f"lora_unet_{module.replace('.', '_')}"
        assert names.find(own) == names.find(name)


def adapter_of(shapes: dict[str, tuple[int, int]], path: Path, spelling: str = "lora_down lora_up alpha") -> LoadedLora:
    """A file with factors of rank 1 for modules with these (out, in)."""
    down, up, *alpha = spelling.split()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for module, (out, wide) in shapes.items():
        state[f"{module}.{down}.weight"] = torch.randn(1, wide, generator=generator)
        state[f"{module}.{up}.weight"] = torch.randn(out, 1, generator=generator)
        if alpha:
            state[f"{module}.alpha"] = torch.tensor(0.5)
    save_file(state, path)
    return load(path)


def check(lora: LoadedLora, theirs: dict[str, torch.Tensor], kind: str) -> None:
    """Every update is what diffusers makes of the file, and lies at a weight that the full-size model has."""
    base = base_of(full_size(kind))
    own = convert_names(lora, base, "hf")
    assert own.naming == "hf"
    modules = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith(".lora_A.weight")}
    assert {name.removesuffix(".weight") for name in own.adapters} == modules
    for module in modules:
        delta = own.adapters[f"{module}.weight"]
        assert base.misfit(f"{module}.weight", delta) is None
        expected = theirs[f"{module}.lora_B.weight"] @ theirs[f"{module}.lora_A.weight"][:, :7]
        got = delta.scaling * delta.b @ delta.a[:, :7]
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6, atol=1e-7)


def flux() -> dict[str, tuple[int, int]]:
    """Black Forest Labs' modules with their sizes (src/flux/model.py)."""
    d, mlp = 3072, 12288
    found = {}
    for n in range(19):
        for part in ("img", "txt"):
            found[f"double_blocks.{n}.{part}_attn.qkv"] = 3 * d, d
            found[f"double_blocks.{n}.{part}_attn.proj"] = d, d
            found[f"double_blocks.{n}.{part}_mlp.0"] = mlp, d
            found[f"double_blocks.{n}.{part}_mlp.2"] = d, mlp
            found[f"double_blocks.{n}.{part}_mod.lin"] = 6 * d, d
    for n in range(38):
        found[f"single_blocks.{n}.linear1"] = 3 * d + mlp, d
        found[f"single_blocks.{n}.linear2"] = d, d + mlp
        found[f"single_blocks.{n}.modulation.lin"] = 3 * d, d
    return found


def flat(shapes: dict[str, Any], front: str = "lora_unet_") -> dict[str, Any]:
    return {front + module.replace(".", "_"): shape for module, shape in shapes.items()}


def test_a_flux_adapter_of_kohya_is_cut_as_diffusers_cuts_it(tmp_path: Path) -> None:
    text = {f"text_model.encoder.layers.{n}.mlp.fc1": (3072, 768) for n in range(12)}
    lora = adapter_of(flat(flux()) | flat(text, "lora_te1_"), tmp_path / "one.safetensors")
    state = {key: value for key, value in _state(lora).items() if key.startswith("lora_unet")}
    own = convert_names(lora, base_of(full_size("flux")), "hf")
    assert sum(name.startswith("text_encoder.") for name in own.adapters) == 12
    image = lora.select("lora_unet_*")
    check(image, theirs._convert_kohya_flux_lora_to_diffusers(state), "flux")


@pytest.mark.parametrize("front", ["diffusion_model.", ""])
def test_so_is_one_with_the_names_of_fluxs_own_code(tmp_path: Path, front: str) -> None:
    shapes = {front + module: shape for module, shape in flux().items()}
    lora = adapter_of(shapes, tmp_path / "one.safetensors", "lora_A lora_B")
    assert lora.naming == "hf"
    state = {}
    for key, value in _state(lora).items():
        module, _, part = key.removeprefix(front).partition(".lora_")
        state[f"lora_unet_{module.replace('.', '_')}.{'lora_down' if part[0] == 'A' else 'lora_up'}.weight"] = value
    check(lora, theirs._convert_kohya_flux_lora_to_diffusers(state), "flux")


def test_the_last_norm_has_its_halves_turned(tmp_path: Path) -> None:
    shapes = {"final_layer.adaLN_modulation.1": (6144, 3072), "final_layer.linear": (64, 3072), "img_in": (3072, 64),
              "txt_in": (3072, 4096), "vector_in.in_layer": (3072, 768), "guidance_in.out_layer": (3072, 3072),
              "time_in.in_layer": (3072, 256)}  # fmt: skip
    lora = adapter_of(flat(shapes), tmp_path / "one.safetensors")
    own = convert_names(lora, base_of(full_size("flux")), "hf")
    expected = theirs.swap_scale_shift(
        torch.from_numpy(lora.adapters["lora_unet_final_layer_adaLN_modulation_1"].b.copy())
    )
    np.testing.assert_array_equal(own.adapters["transformer.norm_out.linear.weight"].b, expected)
    assert set(own.adapters) >= {f"transformer.{m}.weight" for m in ("proj_out", "x_embedder", "context_embedder")}


def wan(image: bool) -> dict[str, tuple[int, int]]:
    """Wan's own modules (wan/modules/model.py)."""
    d, ffn = 5120, 13824
    found = {}
    for n in range(40):
        for attention in ("self_attn", "cross_attn"):
            found |= {f"blocks.{n}.{attention}.{part}": (d, d) for part in "qkvo"}
        if image:
            found |= {f"blocks.{n}.cross_attn.{part}_img": (d, d) for part in "kv"}
        found |= {f"blocks.{n}.ffn.0": (ffn, d), f"blocks.{n}.ffn.2": (d, ffn)}
    return found


@pytest.mark.parametrize("image", [False, True])
def test_wan_adapters_are_read_as_diffusers_does(tmp_path: Path, image: bool) -> None:
    kind = "wan-i2v" if image else "wan"
    comfy = adapter_of(
        {f"diffusion_model.{m}": s for m, s in wan(image).items()}, tmp_path / "c.safetensors", "lora_A lora_B"
    )
    check(comfy, theirs._convert_non_diffusers_wan_lora_to_diffusers(_state(comfy)), kind)
    musubi = adapter_of(flat(wan(image)), tmp_path / "m.safetensors")
    check(musubi, theirs._convert_musubi_wan_lora_to_diffusers(_state(musubi)), kind)


def _state(lora: LoadedLora) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    assert lora.source is not None
    return load_file(lora.source)


def test_what_fits_nowhere_is_listed(tmp_path: Path) -> None:
    lora = adapter_of({"lora_unet_nowhere": (3, 3), "lora_unet_img_in": (3072, 64)}, tmp_path / "one.safetensors")
    with pytest.raises(NamingError) as caught:
        convert_names(lora, base_of(full_size("flux")), "hf")
    assert [line.split(" is ")[0] for line in caught.value.problems] == ["weight lora_unet_nowhere"]
    base = BaseModel("g", "gguf", "llama", {}, {"blk.0.attn_q.weight": (2, 2)})
    with pytest.raises(NamingError, match="only the list of a Hugging Face base says"):
        convert_names(lora, base)


def test_two_modules_of_one_flat_name_are_an_error() -> None:
    names = ForeignNames({"unet.a_b.c.weight": (1, 1), "unet.a.b_c.weight": (1, 1), "unet.d.weight": (1, 1)})
    with pytest.raises(NamingError, match=r"several modules of the base have this name: a_b\.c, a\.b_c"):
        names.find("lora_unet_a_b_c")
    assert names.kohya("unet.a_b.c.weight") is None
    assert names.find("lora_unet_d")[0].weight == "unet.d.weight"


def test_kernels_are_those_of_the_base() -> None:
    """SD 1.5 projects with convolutions of one position, SDXL with linear layers; LyCORIS keeps kernels flat."""
    base = BaseModel(
        "b", "hf", None, {}, {"unet.a.weight": (4, 3, 1, 1), "unet.b.weight": (4, 3), "unet.c.weight": (4, 2, 3, 3)}
    )
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors(
        {
            "lora_unet_a": (rng.normal(size=(2, 3)), rng.normal(size=(4, 2))),
            "lora_unet_b": (rng.normal(size=(2, 3, 1, 1)), rng.normal(size=(4, 2, 1, 1))),
            "lora_unet_c": (rng.normal(size=(2, 18)), rng.normal(size=(4, 2))),
        },
        naming="kohya",
    )
    own = settle(lora, base)
    for name, delta in own.adapters.items():
        assert base.misfit(name, delta) is None
        was = lora.adapters[f"lora_unet_{name.split('.')[1]}"]
        np.testing.assert_allclose(delta.dense().reshape(4, -1), was.dense().reshape(4, -1), rtol=1e-6)
