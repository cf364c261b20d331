"""PEFT's variants of LoRA whose trained update is an ordinary one: what their files hold that a plain file does not.

VeLoRA (Miles et al. 2024, arXiv:2405.17991) and MonteCLoRA change the passes of training only, and save what these need
beside the factors. BD-LoRA keeps of one factor the blocks of a block-diagonal matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorastack.core.factor import Factor
from lorastack.errors import Problems, shown

#: Blocks of a factor: as many as machines share a layer. More would make much of a small file.
MAX_BLOCKS = 256
#: VeLoRA's direction for the backward pass, MonteCLoRA's sampler.
_OF_TRAINING = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")


def is_of_training(key: str) -> bool:
    """Whether a tensor is read by training only: without it the update is the same."""
    return _OF_TRAINING.search(key) is not None


@dataclass(frozen=True)
class Blocks:
    """``use_bdlora``: which modules keep lora_A or lora_B as ``count`` blocks of a diagonal."""

    count: int
    of_a: tuple[str, ...]
    of_b: tuple[str, ...]

    def times(self, module: str) -> tuple[int, int]:
        """How many times wider than stored its lora_A and lora_B are; PEFT looks for parts of a module's last name."""
        name = module.rpartition(".")[2]
        a, b = (any(part in name for part in parts) for parts in (self.of_a, self.of_b))
        return (self.count if a else 1), (self.count if b and not a else 1)


def parse_blocks(raw: Any, label: str, problems: Problems) -> Blocks | None:
    """What ``use_bdlora`` says; None when it is not set."""
    if not raw:
        return None
    said = raw if isinstance(raw, dict) else {}
    count = said.get("nblocks", 1)
    a, b = (said.get(f"target_modules_bd_{factor}") or [] for factor in "ab")
    names = all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in (a, b))
    if said and names and type(count) is int and 0 < count <= MAX_BLOCKS:
        return Blocks(count, tuple(a), tuple(b))
    problems.add(
        f"{label}: use_bdlora is {shown(raw)}, expected target_modules_bd_a and target_modules_bd_b (lists of names) "
        f"and nblocks (a whole number, at most {MAX_BLOCKS}); correct the config"
    )
    return None


def block_diagonal(factor: Factor, columns: int) -> Factor:
    """A factor whose rows have the columns of their own block only, as one of ``columns`` that has zeros elsewhere."""
    rows, width = factor.shape[:2]
    if width == columns:
        return factor
    blocks = columns // width
    each = rows // blocks
    shape = (rows, columns, *factor.shape[2:])

    def spread(array: np.ndarray) -> np.ndarray:
        whole = np.zeros(shape, array.dtype)
        for i in range(blocks):
            whole[i * each : (i + 1) * each, i * width : (i + 1) * width] = array[i * each : (i + 1) * each]
        return whole

    return factor.mapped(spread, shape)
