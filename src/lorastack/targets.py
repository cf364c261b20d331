"""Targets: what the formats and the programs that read them can hold, in one table.

`convert` and `bake` write what a target's row allows and refuse the rest by name; the documentation's table is made of
it. The rows of programs were read off their own code: vLLM 0.32 (lora/peft_helper.py, lora/lora_model.py), SGLang 0.5
(srt/lora), llama.cpp (llama-adapter.cpp), ComfyUI (comfy/lora.py), mlx-lm (tuner/utils.py).
"""

from __future__ import annotations

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

    @property
    def is_program(self) -> bool:
        """Whether it is a program, and not a format by itself."""
        return self.name not in _FORMATS


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORMATS = ("peft", "gguf", "kohya", "comfyui", "diffusers", "mlx")
_IMAGE = _kinds("linear conv")
#: What --max-lora-rank takes (config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ROWS = (
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
    Target("vllm", "vLLM", "peft", kinds=_kinds("linear embedding experts"), one_scaling=True, ranks=VLLM_RANKS,
           note="ranks above 16 need --max-lora-rank; alpha patterns are not looked at, so scalings are folded"),
    Target("sglang", "SGLang", "peft", one_scaling=True, one_rank=True, experts="one by one",
           note="rsLoRA and patterns are not looked at, so scalings are folded and ranks filled up"),
    Target("llama.cpp", "llama.cpp", "gguf", _kinds("alora"), _kinds("linear embedding experts"), "fused"),
    Target("ollama", "Ollama", "gguf", kinds=_kinds("linear embedding experts"), experts="fused",
           note="one adapter for a model, named in its Modelfile"),
    Target("comfyui-app", "ComfyUI", "kohya", _kinds("dora diff diff_b lokr"), _IMAGE),
    Target("mlx-lm", "mlx-lm", "mlx", _kinds("dora"), _kinds("linear embedding"), "one by one", one_scaling=True,
           one_rank=True, note="every weight has a DoRA magnitude, or none"),
)  # fmt: skip
TARGETS = {target.name: target for target in _ROWS}


def target_of(name: str) -> Target:
    """The row of a format or a program.

    Raises
    ------
    ArgumentError
        When there is none of that name.
    """
    if name not in TARGETS:
        raise ArgumentError(f"there is no target {name!r}; there are {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def room_for(target: Target, rank: int) -> int | None:
    """The rank that a program has to be started for; None where any is taken.

    >>> room_for(target_of("vllm"), 24), room_for(target_of("gguf"), 24)
    (32, None)
    """
    return next((one for one in target.ranks if one >= rank), None)


def holds(target: Target, kind: str) -> bool:
    """Whether a target honours a kind of extras, or nothing is lost without it."""
    return kind in target.extras or kind in HARMLESS
