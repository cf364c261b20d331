"""BaseModel: the names and shapes of a base's weights; a weight is read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorastack.base.architectures import Architecture, architecture_of
from lorastack.base.foreign import ForeignNames
from lorastack.base.parts import in_pipeline, in_text_encoder
from lorastack.base.spelling import TEXT_PARTS, other_spellings
from lorastack.base.tables import Rename, live_names
from lorastack.core.delta import Kind, LoraDelta
from lorastack.core.target import Naming
from lorastack.errors import FormatError, ShapeError, UnknownNameError, UnsupportedError, shown
from lorastack.formats.gguf_header import Header
from lorastack.formats.safetensors_file import SafetensorsFile

#: Why a weight cannot hold what a live model adds.
IN_GROUPS = "is a convolution in groups, and the update is of all its channels"
#: No model has more blocks, nor more heads in one.
MAX_LAYERS, MAX_HEADS = 1_000, 65_536
#: Classes with transformers' Conv1D, and the layers that are.
_WITH_CONV1D = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")
_CONV1D = tuple(f".{layer}.weight" for layer in ("c_attn", "q_attn", "c_proj", "c_fc"))
#: Classes whose experts say of themselves that they are ``[E, in, out]`` (``is_transposed``): a square one does not
#: show it. Llama 4 keeps them so too and does not say it: to PEFT its factors are those of ``[E, out, in]``.
_TURNED_EXPERTS = ("GptOss", "OpenAIPrivacyFilter", "Aria")


class Part(NamedTuple):
    """One tensor of a base's files, by its name there, or some rows of it; `rows.py` reads it."""

    file: SafetensorsFile | Header
    key: str
    #: From this to that along its first axis, of a tensor that holds several weights; None for the whole.
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stored:
    """One weight of a base: the files it lies in, several for experts that are kept one by one, and how to read it.

    ``parts`` are the tensors that it is: one, or for such experts all, expert by expert, gate before up.
    """

    files: tuple[Path, ...]
    read: Callable[[], np.ndarray]
    parts: tuple[Part, ...] = ()


class Use(NamedTuple):
    """The kind of update that a weight takes, and whether it is kept ``[in, out]``."""

    kind: Kind
    turned: bool


@dataclass(frozen=True)
class BaseModel:
    """A base model's weight names, shapes and configuration; no weight is read before `weight` asks for it.

    Attributes
    ----------
    shapes
        Every weight, by the live model's name for it, with its shape in NumPy's order (``[out, in]``); ``()``
        where that cannot be told, of packed weights above all.
    stored
        Its place on the disk; empty for a model in memory.
    prefix
        What the model's class puts before the names of its backbone (``base_model_prefix``); None: not known.
    tied
        Names of ``shapes`` that are another weight under a second name: the head of a model that ties it.
    renaming
        transformers' own renaming of this model, for a live one; a base from files asks its class when it has to.
    parts
        The models of an image pipeline, whose names are the fronts of its weights'; empty for a single model.
    single_file
        Whether it is one .safetensors file, and no folder.
    use
        How a live model computes with a weight; of a base from files `roles.use_of` tells.
    roles
        What its class says of weights, where that was asked (`all_names`); of others `roles.role_of` guesses.
    """

    name: str
    naming: Naming
    architecture_name: str | None
    config: Mapping[str, Any] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False, compare=False)
    prefix: str | None = None
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    renaming: Callable[[], Rename | None] | None = field(default=None, repr=False, compare=False)
    parts: tuple[str, ...] = field(default=(), repr=False)
    single_file: bool = field(default=False, repr=False)
    use: Callable[[str], Use | None] | None = field(default=None, repr=False, compare=False)
    roles: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def own_name(self, name: str) -> str | None:
        """The base's own name of the weight that an adapter calls ``name``; None when it has none.

        transformers' tables are asked last: building a class takes a second.
        """
        if name in self.shapes or self.naming != "hf":
            return name if name in self.shapes else None
        if (packed := f"{name.removesuffix('weight')}in_proj_weight") in self.shapes:
            return packed  # to PEFT the projections of nn.MultiheadAttention are its weight
        model_type = self.config.get("model_type")
        if self.parts:
            others = in_pipeline(name, self.parts)
        else:
            spelt = other_spellings(name, model_type, self.prefix, self._first_parts)
            others = chain(in_text_encoder(name, self.shapes), spelt)
        for other in others:
            if other in self.shapes:
                return other
        places = self.foreign.find(name)
        if places:
            return places[0].weight if len(places) == 1 and places[0].whole else None
        if "." not in name or self.parts:
            return None
        rename = self._rename
        if rename is None:
            return self.live.own_name(name) if self.live else None
        own = rename(name)
        return own if own in self.shapes and not self._of_a_text_model(name, own) else None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of the weight ``name``, ``()`` where it cannot be told; None when the base has no such weight."""
        shape = self.shapes.get(name)
        return shape if shape is not None or name not in self._asked else self._asked[name]

    @cached_property
    def foreign(self) -> ForeignNames:
        """What kohya, ComfyUI and the model's own code call its weights."""
        return ForeignNames(self.shapes)

    @cached_property
    def live(self) -> BaseModel | None:
        """A base from files as transformers' own class has it; None for a live one, and where there is none."""
        said = live_names(self.config) if self.stored and self.naming == "hf" else None
        if said is None:
            return None
        renamed = {said.rename(name) if said.rename else name: name for name in self.shapes}
        own = {name: renamed.get(name, name) for name in said.shapes}
        stored = {
            name: self.stored[there]
            for name, there in own.items()
            if there in self.stored and self.shapes[there] in ((), said.shapes[name])
        }
        stored |= {name: stored[of] for name, of in said.tied.items() if of in stored}
        shapes = {name: () if self.quantised and name not in stored else shape for name, shape in said.shapes.items()}
        rename = said.rename or (lambda name: name)
        return replace(
            self,
            shapes=shapes,
            stored=stored,
            prefix=said.prefix,
            tied=said.tied,
            renaming=lambda: rename,
            roles=said.roles,
        )

    @property
    def _asked(self) -> Mapping[str, tuple[int, ...]]:
        """The names of the live class, if it was asked: what `own_name` gives may be one of them."""
        live = self.__dict__.get("live")
        return live.shapes if live else {}

    @cached_property
    def _rename(self) -> Rename | None:
        return self.renaming() if self.renaming else None

    def _of_a_text_model(self, name: str, own: str) -> bool:
        """Whether a text model calls its weight ``name`` too: the adapter may be one's, and is not taken silently."""
        return bool(self.text_prefix) and name.startswith("model.") and own == self.text_prefix + name[len("model.") :]

    @property
    def count(self) -> int:
        """How many weights the base has, those under a second name left out."""
        return len(self.shapes) - len(self.tied)

    def experts_in(self, name: str) -> int | None:
        """How many experts the parameter ``name`` holds; None where its shape is not known."""
        shape = self.shape_of(name)
        return shape[0] if shape and len(shape) == 3 else None

    @cached_property
    def text_prefix(self) -> str:
        """What stands before the text part's names in a model with pictures or sound; empty for a text model."""
        return next((part for part in TEXT_PARTS if any(name.startswith(part) for name in self.shapes)), "")

    @cached_property
    def _first_parts(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.shapes)

    @cached_property
    def architecture(self) -> Architecture:
        """The listed architecture; UnsupportedError when its row order is not known."""
        text = self.config.get("text_config")
        return architecture_of(
            self.architecture_name, self.naming, text.get("model_type") if isinstance(text, dict) else None
        )

    @property
    def layers(self) -> int:
        """How many blocks the model has."""
        return self._number("block_count", "num_hidden_layers", "n_layer", "num_layers", "n_layers", most=MAX_LAYERS)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._number("attention.head_count", "num_attention_heads", "n_head", "n_heads", most=MAX_HEADS)

    @property
    def kv_heads(self) -> int:
        """Key/value heads; as many as heads when the configuration names none."""
        if self.naming == "hf" and self.config.get("model_type") == "falcon":
            return self._falcon_groups
        return self._number("attention.head_count_kv", "num_key_value_heads", most=MAX_HEADS, default=self.heads)

    @property
    def _falcon_groups(self) -> int:
        """How many keys Falcon has: transformers reads the number of the new decoder only, and one where not told."""
        if self.config.get("new_decoder_architecture"):
            return self._number("", "num_kv_heads", "n_head_kv", most=MAX_HEADS, default=self.heads)
        return 1 if self.config.get("multi_query", True) else self.heads

    def number(self, key: str) -> int:
        """A whole number of the configuration, at most that of the heads there can be."""
        return self._number(key, key, most=MAX_HEADS)

    @property
    def quantised(self) -> bool:
        """Whether weights are packed in a way of their own: bitsandbytes, GPTQ, AWQ, FP8 with scales beside it."""
        return bool(self.config.get("quantization_config"))

    def weight(self, name: str) -> np.ndarray:
        """The weight ``name`` in float32 (float64 where the file has that), as stored: see `shapes`.

        Quantised GGUF types are dequantised. Read anew each time, and not kept.

        Raises
        ------
        UnknownNameError
            When the base has no such weight, or was not opened from files.
        UnsupportedError
            When it is quantised in a way of its own: bitsandbytes, GPTQ, AWQ, FP8 with scales beside it.
        """
        place = self.place_of(name)
        if place is None:
            made = "transformers makes it of others when it loads them"
            why = made if self.shape_of(name) is not None else "it has no such weight"
            why = why if self.stored else "it is in memory only, open it with open_base(path)"
            raise UnknownNameError(f"base {self.name}: weight {name} cannot be read; {why}")
        if self.quantised:
            raise UnsupportedError(
                f"base {self.name}: its weights are quantised (quantization_config), which is not read here; "
                "give the model it was made from"
            )
        return place.read()

    def place_of(self, name: str) -> Stored | None:
        """Where the weight ``name`` lies; None where no file has it as it is, or the base is in memory only."""
        live = self.__dict__.get("live")
        return self.stored.get(name) or (live.stored.get(name) if live else None)

    def weight_of(self, name: str, delta: LoraDelta) -> np.ndarray:
        """The weight as what ``delta`` adds to: ``[matrices, out, in]``, one matrix but for experts.

        GPT-2's ``Conv1D`` and embeddings are turned over, a convolution is ``[out, in * kernel]``.

        Raises
        ------
        ShapeError
            When it has another shape than the adapter changes, or is in groups that the update does not have.
        """
        if problem := self.misfit(name, delta):
            raise ShapeError(f"base {self.name}: {problem}")
        if self.in_groups(name, delta):
            raise ShapeError(f"base {self.name}: weight {name} {IN_GROUPS}")
        array = self.weight(name)
        if delta.kind == "conv":
            return array.reshape(1, array.shape[0], -1)
        wide = array if array.ndim == 3 else array[None]
        return wide.swapaxes(1, 2) if self.turned(name, delta) else wide

    def turned(self, name: str, delta: LoraDelta) -> bool:
        """Whether the weight is kept ``[in, out]``: an embedding, GPT-2's ``Conv1D``, the experts of some models."""
        if delta.kind == "stored":
            return False
        if delta.kind == "experts":
            shape = (self.shape_of(name) or ())[-2:]
            if delta.in_features != delta.out_features:
                return shape == (delta.in_features, delta.out_features)
        return self.kept_turned(name, delta.kind)

    def kept_turned(self, name: str, kind: Kind) -> bool:
        """The same where there is no update yet whose shape would say it: a model keeps its experts one way."""
        if kind == "experts":
            return (self.architecture_name or "").startswith(_TURNED_EXPERTS)
        return kind == "embedding" or (kind == "linear" and self._is_conv1d(name))

    def misfit(self, name: str, delta: LoraDelta) -> str | None:
        """Say why ``delta`` is no update of the weight ``name``; None when it is, or its shape cannot be told."""
        shape = self.shape_of(name)
        # A quantised weight is stored packed, in a shape of its own.
        if not shape or self.quantised or shape in (wanted := self._shapes(name, delta)) or self.in_groups(name, delta):
            return None
        changes = " or ".join(str(list(s)) for s in wanted)
        return f"weight {name} is {list(shape)} in the base, this adapter changes {changes}"

    def in_groups(self, name: str, delta: LoraDelta) -> bool:
        """Whether the weight is a convolution whose groups see some of the channels each; its update sees all.

        A live model can add that (PEFT makes such adapters), a weight cannot hold it.
        """
        shape = self.shape_of(name) or ()
        if delta.kind != "conv" or len(shape) < 3:
            return False
        channels, *kernel = delta.factors[0].shape[1:]
        groups = channels // shape[1] if channels % shape[1] == 0 else 0
        return groups > 1 and shape == (delta.out_features, channels // groups, *kernel) and shape[0] % groups == 0

    def _shapes(self, name: str, delta: LoraDelta) -> list[tuple[int, ...]]:
        """The shapes of a weight that the update fits."""
        n_in, n_out = delta.in_features, delta.out_features
        if delta.kind == "embedding":
            return [(n_in, n_out)]
        if delta.kind == "conv":
            return [(n_out, *delta.factors[0].shape[1:])]
        if delta.kind == "stored":
            return [(delta.num_experts, n_out, n_in)] if delta.num_experts else [(n_out, n_in), (1, n_out, n_in)]
        if delta.kind == "experts":
            experts = delta.num_experts or 0
            return list(dict.fromkeys([(experts, n_out, n_in), (experts, n_in, n_out)]))
        return [(n_in, n_out) if self._is_conv1d(name) else (n_out, n_in)]

    def _is_conv1d(self, name: str) -> bool:
        """transformers' Conv1D, which only GPT-2 and its kin use for all but the head, keeps its weight [in, out]."""
        gpt2 = self.naming == "hf" and (self.architecture_name or "").startswith(_WITH_CONV1D)
        return gpt2 and name.endswith(_CONV1D)

    def _number(self, gguf_key: str, *hf_keys: str, most: int, default: int | None = None) -> int:
        keys = [f"{self.architecture_name}.{gguf_key}"] if self.naming == "gguf" else list(hf_keys)
        text = self.config.get("text_config")
        for said in (self.config, text if isinstance(text, dict) else {}):
            for key in keys:
                value = said.get(key)
                if value is None:
                    continue
                if isinstance(value, list):  # layer by layer, 0 for those without attention
                    value = _the_one(value)
                if type(value) is int and 0 < value <= most:
                    return value
                raise FormatError(
                    f"base {self.name}: its configuration has {key} = {shown(value)}, expected 1 to {most:,}"
                )
        if default is not None:
            return default
        raise FormatError(f"base {self.name}: its configuration names no {' or '.join(keys)}")


def _the_one(values: list[Any]) -> Any:
    """The number that a list of each layer's has, zeros left out; the list itself where it has several."""
    others = [value for value in values if value != 0]
    return others[0] if others and all(value == others[0] for value in others) else values
