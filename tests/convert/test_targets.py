"""The table of targets says of every format what its writer does, and of every program what it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from lorastack import LoadedLora, convert, load, save
from lorastack.cli.options import Program
from lorastack.converting import fitting
from lorastack.core.delta import LoraDelta
from lorastack.core.extras import HARMLESS, KINDS
from lorastack.core.factor import Factor
from lorastack.core.kronecker import Kronecker
from lorastack.errors import ArgumentError, FormatError, LoraStackError
from lorastack.targets import FORMATS, PROGRAMS, Target, format_of, holds, program_of

ROWS = [*FORMATS.values(), *PROGRAMS.values()]
NAMES = {"linear": "unet.mid_block.attentions.0.proj_in", "conv": "unet.mid_block.resnets.0.conv1"}
SHAPES = {
    "linear": ((2, 6), (4, 2)),
    "conv": ((2, 6, 3, 3), (4, 2, 1, 1)),
    "embedding": ((2, 6), (4, 2)),
    "experts": ((3, 2, 6), (3, 4, 2)),
}


def name_for(target: Target, kind: str) -> str:
    """A weight's name that the format has, so that only the kind of update can be refused."""
    if target.format == "gguf":
        return {"embedding": "token_embd.weight", "experts": "blk.0.ffn_down_exps.weight"}.get(
            kind, "blk.0.attn_q.weight"
        )
    if target.format == "comfyui":
        return "diffusion_model.double_blocks.0.img_attn.proj.weight"
    if target.format in ("kohya", "diffusers"):
        return f"{NAMES.get(kind, 'unet.conv_in')}.weight"
    return "model.layers.0.mlp.experts.down_proj" if kind == "experts" else "model.layers.0.mlp.down_proj.weight"


def adapter(target: Target, kind: str = "linear") -> LoadedLora:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in SHAPES[kind])
    delta = LoraDelta(a, b, 0.5, kind)  # type: ignore[arg-type]
    return LoadedLora.from_tensors(
        {name_for(target, kind): delta}, name="one", naming="gguf" if target.format == "gguf" else "hf"
    )


def write(lora: LoadedLora, target: Target, folder: Path) -> None:
    ending = {"gguf": ".gguf", "peft": "", "mlx": ""}.get(target.format, ".safetensors")
    save(lora, folder / f"out{ending}", format=target.format, architecture="llama" if target.format == "gguf" else None)


def writes(lora: LoadedLora, target: Target, folder: Path) -> bool:
    try:
        write(lora, target, folder)
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("target", FORMATS.values(), ids=FORMATS)
def test_a_format_holds_the_kinds_of_updates_that_its_row_says(target: Target, kind: str, tmp_path: Path) -> None:
    assert writes(adapter(target, kind), target, tmp_path) == (kind in target.kinds)


def extras(kind: str, weight: str) -> dict[str, object]:
    stem = weight.removesuffix(".weight")
    ones = Factor.of(np.ones(4, np.float32), kind)
    row = Factor.of(np.ones((1, 4), np.float32), kind)
    front = stem.rpartition(".")[0]
    other = front.replace(".0.", ".1.") + ".proj" if "double_blocks" in front else front + ".conv_shortcut"
    return {
        "dora": {weight: ones},
        "lora_bias": {weight: ones},
        "bias": {f"{stem}.bias": ones},
        "modules_to_save": {"score.weight": row},
        "new_tokens": {"model.embed_tokens.weight": ((3,), row)},
        "norm": {"blk.0.attn_norm.weight": ones},
        "base_weight": {"model.embed_tokens.weight": row},
        "lokr": {f"{other}.weight": Kronecker(row, row, 1.0)},
        "diff": {f"{other}.weight": row},
        "diff_b": {f"{stem}.bias": ones},
        "alora": {"invocation_tokens": (1, 2)},
    }[kind]  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", FORMATS.values(), ids=FORMATS)
def test_a_format_holds_the_extras_that_its_row_says(target: Target, kind: str, tmp_path: Path) -> None:
    lora = adapter(target)
    (weight,) = lora.adapters
    said = {"modules_to_save": ["score"], "bias": "all", "trainable_token_indices": {"embed_tokens": [3]}}
    held = replace(lora, extras=MappingProxyType({kind: extras(kind, weight)}), metadata=MappingProxyType(said))
    written = writes(held, target, tmp_path)
    if kind in HARMLESS:
        assert written
        return
    assert written == holds(target, kind)
    if not written:
        with pytest.raises(FormatError, match=kind):
            fitting(held, target)


def test_programs_are_refused_what_their_format_could_hold(tmp_path: Path) -> None:
    vllm = program_of("vllm")
    lora = adapter(vllm)
    (weight,) = lora.adapters
    held = replace(lora, extras=MappingProxyType({"dora": extras("dora", weight)}))
    with pytest.raises(FormatError, match=r"cannot be written for vLLM: 1 problem\n.*dora: a DoRA magnitude"):
        convert(held, tmp_path / "out", target="vllm")
    wide = LoadedLora.from_tensors({weight: (np.ones((600, 700)), np.ones((700, 600)))}, naming="hf")
    with pytest.raises(FormatError, match=r"has rank 600, vLLM takes at most 512"):
        convert(wide, tmp_path / "out", target="vllm")
    assert not any(tmp_path.iterdir())


def test_words_that_are_no_target() -> None:
    with pytest.raises(ArgumentError, match=r"no program 'vlm'.*did you mean vllm"):
        program_of("vlm")
    with pytest.raises(ArgumentError, match=r"no format 'vllm'; there are peft, gguf"):
        format_of("vllm")


def test_the_help_names_every_program_that_takes_adapters() -> None:
    (option,) = [one for one in Program.__metadata__ if hasattr(one, "help")]
    assert option.help.partition(": ")[2].split(", ") == [row.name for row in PROGRAMS.values() if row.kinds]


def test_a_file_of_an_ending_that_several_have_needs_its_format(tmp_path: Path) -> None:
    lora = adapter(format_of("kohya"))
    with pytest.raises(ArgumentError, match=r"say which with to='kohya'"):
        convert(lora, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match=r"vLLM reads 'peft', not 'gguf'"):
        convert(lora, tmp_path / "x", to="gguf", target="vllm")
    assert load(convert(lora, tmp_path / "x.safetensors", to="kohya")).num_adapters() == 1


def test_every_row_is_one_of_the_formats() -> None:
    for row in ROWS:
        own = FORMATS[row.format]
        assert row.extras <= own.extras, row.name
        assert row.kinds <= own.kinds, row.name
        assert row.extras <= set(KINDS)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("target", ROWS, ids=lambda row: row.title)
def test_an_update_is_refused_where_its_row_has_no_place_for_it(target: Target, kind: str) -> None:
    single = kind == "experts" and target.experts == "one by one"  # each of them is a linear layer then
    held = "linear" in target.kinds if single else kind in target.kinds
    lora = adapter(target, kind)
    if held:
        assert {delta.kind for delta in fitting(lora, target).adapters.values()} == {"linear" if single else kind}
    else:
        with pytest.raises(LoraStackError, match=f"cannot be written (for|as) {target.title}"):
            fitting(lora, target)
