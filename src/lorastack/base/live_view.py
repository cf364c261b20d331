"""The weights of a base's files as the live model has them: renamed, unpacked by name, experts together, heads tied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lorastack.base.architectures import BY_HF
from lorastack.base.experts import single
from lorastack.base.model import BaseModel, Stored
from lorastack.base.spelling import beside_packed, live_spelling, packed_weight

Shape = tuple[int, ...]
_EMBEDDINGS = tuple(
    f"{name}.weight" for name in "embed_tokens wte word_embeddings embed_in shared embeddings tokens_embed".split()
)
#: Class -> what it calls its head, where that is not ``lm_head``.
_HEADS = {
    "GPTNeoXForCausalLM": "embed_out.weight",
    "WhisperForConditionalGeneration": "proj_out.weight",
    "BioGptForCausalLM": "output_projection.weight",
}
_WITH_A_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def live_view(
    given: str, config: Mapping[str, Any], shapes: Mapping[str, Shape], stored: Mapping[str, Stored]
) -> BaseModel:
    """The base that a folder's tensors and its config.json make.

    ``shapes`` and ``stored`` go by the names in the files.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else None
    view = _View(config, _prefix(list(shapes), architecture))
    for key, shape in shapes.items():
        view.take(key, shape, stored[key])
    view.join_experts()
    view.tie(architecture)
    return BaseModel(given, "hf", architecture, config, view.shapes, view.stored, tied=view.tied)


class _View:
    """Live name -> shape, place; filled key by key."""

    def __init__(self, config: Mapping[str, Any], prefix: str) -> None:
        self.shapes: dict[str, Shape] = {}
        self.stored: dict[str, Stored] = {}
        self.tied: dict[str, str] = {}
        self._model_type = config.get("model_type")
        self._quantised = bool(config.get("quantization_config"))
        self._config, self._prefix = config, prefix

    def take(self, key: str, shape: Shape, place: Stored) -> None:
        """Put a tensor of the files under its live name."""
        if self._quantised:
            if weight := packed_weight(key):
                key, shape = weight, ()
            elif beside_packed(key):
                return
        if not key.startswith(("lm_head", "embed_out")):
            key = self._prefix + key
        name = live_spelling(key, self._model_type)
        self.shapes[name], self.stored[name] = shape, place

    def join_experts(self) -> None:
        """Experts that files keep one by one are one parameter in the live model (transformers 5)."""
        blocks: dict[str, dict[str, dict[int, str]]] = {}
        for name in self.shapes:
            if one := single(name):
                blocks.setdefault(one[0], {}).setdefault(one[2], {})[one[1]] = name
        for block, parts in blocks.items():
            for parameter, wanted in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                members = [parts.get(part, {}) for part in wanted]
                numbers = sorted(members[0])
                flat = [at[n] for n in numbers for at in members if n in at]
                if numbers != list(range(len(numbers))) or len(flat) != len(members) * len(numbers) or not flat:
                    continue
                # Packed experts have shapes of their own, which say nothing.
                known = {self.shapes[name] for name in flat}
                if len(known) > 1:
                    continue
                (shape,) = known
                holder = f"{block}.{parameter}"
                whole = (len(numbers), shape[0] * len(members), shape[1]) if len(shape) == 2 else ()
                places = [[self.stored[at[n]] for at in members] for n in numbers]
                files = tuple(dict.fromkeys(file for row in places for place in row for file in place.files))
                for name in flat:
                    del self.shapes[name], self.stored[name]
                self.shapes[holder] = whole
                tensors = tuple(part for row in places for place in row for part in place.parts)
                self.stored[holder] = Stored(files, partial(_stacked, places), tensors)

    def tie(self, architecture: str | None) -> None:
        """Give tied weights, which a file holds once, each of their names."""
        for name in [name for name in self.shapes if name.endswith("shared.weight")]:
            for stack in ("encoder", "decoder"):
                self._alias(f"{name.removesuffix('shared.weight')}{stack}.embed_tokens.weight", name)
        text = self._config.get("text_config")
        said = self._config.get(
            "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None
        )
        if said is False or not architecture or not architecture.endswith(_WITH_A_HEAD):
            return
        embeddings = [
            name for ending in _EMBEDDINGS for name in self.shapes if name.endswith("." + ending) or name == ending
        ]
        if embeddings:
            self._alias(_HEADS.get(architecture, "lm_head.weight"), min(embeddings, key=lambda name: name.count(".")))

    def _alias(self, name: str, of: str) -> None:
        if name not in self.shapes:
            self.shapes[name], self.stored[name], self.tied[name] = self.shapes[of], self.stored[of], of


def _prefix(names: list[str], architecture: str | None) -> str:
    """What the model's class puts before its names where the file leaves it out, as some on the hub (GPT-2's) do."""
    said = BY_HF[architecture].prefix if architecture in BY_HF else ""
    prefix = f"{said}." if said else ""
    return "" if any(name.startswith(prefix) for name in names) else prefix


def _stacked(places: list[list[Stored]]) -> np.ndarray:
    return np.stack([np.concatenate([place.read() for place in row]) for row in places])
