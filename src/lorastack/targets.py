"""Targets: what the formats and the programs that read them can hold, in one table.

`convert` and `bake` write what a target's row allows and refuse the rest by name; the documentation's tables are made
of it. The rows of programs were read off their own code: vLLM 0.32 (lora/peft_helper.py, lora/lora_model.py), SGLang
0.5 (srt/lora), TensorRT-LLM (lora_manager.py), LoRAX (adapters/lora.py), llama.cpp (llama-adapter.cpp), ComfyUI
(comfy/lora.py), mlx-lm (tuner/utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorastack.core.extras import HARMLESS
from lorastack.errors import ArgumentError, did_you_mean
from lorastack.formats.writers import Format

#: How the experts of a layer lie in a file: each by itself, or all in one parameter.
Experts = Literal["one by one", "fused"]


@dataclass(frozen=True)
class Target:
    """One format, or one program with the format that it reads.

    Attributes
    ----------
    name, title
        What it is called in commands, and by people.
    format
        What is written for it.
    extras
        Kinds of extras (`lorastack.core.extras`) that it honours.
    kinds
        Kinds of updates that it reads.
    experts
        How it takes experts; None where it takes either, empty where it takes none.
    one_scaling
        Whether one scaling, alpha/rank, is taken for all weights: others are folded into lora_B.
    one_rank
        Whether every weight must have the same rank: smaller ones are filled up with zeros.
    ranks
        The ranks that it can be started for; empty where any is taken.
    note
        What else there is to know, for the documentation.
    given
        Of an engine: how a weighted stack is given to it.
    tried
        With which version that was tried; empty where it was only read off its code or its documentation.
    """

    name: str
    title: str
    format: Format
    extras: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset({"linear"})
    experts: Experts | None = None
    one_scaling: bool = False
    one_rank: bool = False
    ranks: tuple[int, ...] = ()
    note: str = ""
    given: str = ""
    tried: str = ""


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IMAGE = _kinds("linear conv")
#: What --max-lora-rank takes (config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_OF_FORMATS = (
    Target("peft", "PEFT", "peft", _kinds("dora lora_bias bias modules_to_save new_tokens alora base_weight"),
           _kinds("linear conv embedding experts")),
    Target("gguf", "GGUF", "gguf", _kinds("alora norm"), _kinds("linear embedding experts"), "fused",
           note="experts of gate and of up apart; --base says the names and the order of rows"),
    Target("kohya", "kohya", "kohya", _kinds("dora diff diff_b lokr"), _IMAGE),
    Target("comfyui", "ComfyUI's own names", "comfyui", _kinds("dora diff diff_b lokr"), _IMAGE,
           note="names of the model's own code, such as diffusion_model.double_blocks.0.img_attn.qkv"),
    Target("diffusers", "diffusers", "diffusers", _kinds("dora lora_bias"), _IMAGE,
           note="in each model of a pipeline all weights have a DoRA magnitude, or none"),
    Target("mlx", "MLX", "mlx", _kinds("dora"), _kinds("linear embedding"), "one by one", one_scaling=True,
           one_rank=True, note="every weight has a DoRA magnitude, or none"),
)  # fmt: skip
_OF_PROGRAMS = (
    Target("vllm", "vLLM", "peft", kinds=_kinds("linear embedding experts"), one_scaling=True, ranks=VLLM_RANKS,
           note="ranks above 16 need --max-lora-rank; older versions do not look at alpha patterns, so scalings are "
           "folded",
           given="by name in each request, with the plugin: `zara:0.7+excited:0.3`; or a folder of `bake --for vllm`",
           tried="vLLM 0.32 (CPU)"),
    Target("sglang", "SGLang", "peft", one_scaling=True, one_rank=True, experts="one by one",
           note="rsLoRA and patterns are not looked at, so scalings are folded and ranks filled up",
           given="a folder of `bake --for sglang`, under a name: `--lora-paths` or the route `/load_lora_adapter`"),
    Target("tensorrt-llm", "TensorRT-LLM", "peft", _kinds("dora"), one_scaling=True, one_rank=True,
           experts="one by one", note="the alpha of the file is divided by each weight's own rank: patterns are not "
           "looked at, so scalings are folded and ranks filled up; modules it was not built for are left out silently",
           given="a folder of `bake --for tensorrt-llm`: a `LoRARequest` with its path, in each request"),
    Target("lorax", "LoRAX", "peft", one_scaling=True, one_rank=True, experts="one by one",
           note="patterns are not looked at; of a module that some layer lacks, all layers are left out silently",
           given="a folder of `bake --for lorax`: `adapter_id`, with `adapter_source` local, in each request; its own "
           "merge of several sums A and B apart, which is another function"),
    Target("llama.cpp", "llama.cpp", "gguf", _kinds("alora"), _kinds("linear embedding experts"), "fused",
           given="no need to bake: llama-server with `--lora-scaled FILE:SCALE` for each, and in a request "
           "`\"lora\": [{\"id\": 0, \"scale\": 0.7}]`; requests of different scales are not computed together"),
    Target("ollama", "Ollama", "gguf", kinds=_kinds("linear embedding experts"), experts="fused",
           note="one adapter for a model, named in its Modelfile",
           given="a file of `bake --for ollama`: `ADAPTER ./mixture.gguf` in a Modelfile, then `ollama create`"),
    Target("lm-studio", "LM Studio", "gguf", kinds=frozenset(), note="it takes no adapters",
           given="merged: `lorastack merge BASE zara:0.7 excited:0.3 -o mixture.gguf`, a model like any other"),
    Target("comfyui", "ComfyUI", "kohya", _kinds("dora diff diff_b lokr"), _IMAGE),
    Target("mlx-lm", "mlx-lm", "mlx", _kinds("dora"), _kinds("linear embedding"), "one by one", one_scaling=True,
           one_rank=True, note="every weight has a DoRA magnitude, or none"),
)  # fmt: skip
#: What can be written, and who reads it; ComfyUI is a format's name and a program's.
FORMATS = {target.name: target for target in _OF_FORMATS}
PROGRAMS = {target.name: target for target in _OF_PROGRAMS}


def format_of(name: str) -> Target:
    """The row of a format; ArgumentError when there is none of that name."""
    return _row(name, "format", FORMATS)


def program_of(name: str) -> Target:
    """The row of a program; ArgumentError when there is none of that name."""
    return _row(name, "program", PROGRAMS)


def _row(name: str, what: str, rows: Mapping[str, Target]) -> Target:
    if name not in rows:
        raise ArgumentError(f"there is no {what} {name!r}; there are {', '.join(rows)}{did_you_mean(name, rows)}")
    return rows[name]


def room_for(target: Target, rank: int) -> int | None:
    """The rank that a program has to be started for; None where any is taken.

    >>> room_for(program_of("vllm"), 24), room_for(format_of("gguf"), 24)
    (32, None)
    """
    return next((one for one in target.ranks if one >= rank), None)


def holds(target: Target, kind: str) -> bool:
    """Whether a target honours a kind of extras, or nothing is lost without it."""
    return kind in target.extras or kind in HARMLESS
