"""Names that image adapters have for the weights of a base: kohya's, ComfyUI's, those of a model's own code.

kohya writes a module's path with ``_`` for ``.``, which only the base's own list of modules can turn back: one
dictionary for each base says which module a name is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lorastack.base.originals import originals
from lorastack.base.parts import ADAPTED, TEXT_ENCODERS, other_text
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.errors import NamingError
from lorastack.formats.kohya_names import kohya_name

#: Front of a name -> the models it may be of, the likeliest first; "" is a model by itself. T5 is Flux's second text
#: encoder, SD3's third.
_FRONTS: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer", "unet", ""),
    "lora_prior_unet_": ("prior", ""),
    "lora_te_": ("text_encoder", ""),
    "lora_te1_": ("text_encoder", ""),
    "lora_te2_": ("text_encoder_2", ""),
    "lora_te3_": ("text_encoder_3", "text_encoder_2", ""),
    "lycoris_": (*ADAPTED, ""),
    "diffusion_model.": ("unet", "transformer", ""),
    "model.diffusion_model.": ("unet", "transformer", ""),
    "text_encoders.clip_l.transformer.": ("text_encoder", ""),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", ""),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2", ""),
    **{f"{one}.": (one, "") for one in ADAPTED},
    "": ("unet", "transformer", ""),
}
_PARAMETERS = ("weight", "bias")
#: What only a text model has.
_WORDS = frozenset(("embeddings.token_embedding", "text_model.embeddings.token_embedding"))


class Place(NamedTuple):
    """What of a module an update with a foreign name is: the weight, its rows there, and whether halves are turned."""

    weight: str
    first: int = 0
    stop: int | None = None
    swapped: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the weight as it is."""
        return self.stop is None and not self.swapped


class ForeignNames:
    """The foreign names of a base's weights, both ways.

    >>> names = ForeignNames({"unet.mid_block.attentions.0.proj_in.weight": (4, 4), "unet.conv_in.bias": (4,)})
    >>> names.find("lora_unet_mid_block_attentions_0_proj_in")[0].weight
    'unet.mid_block.attentions.0.proj_in.weight'
    >>> names.find("lora_unet_middle_block_1_proj_in") == names.find("lora_unet_mid_block_attentions_0_proj_in")
    True
    >>> names.kohya("unet.mid_block.attentions.0.proj_in.weight")
    'lora_unet_mid_block_attentions_0_proj_in'
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    @cached_property
    def _modules(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Model -> path of a module -> itself."""
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        for name in self._shapes:
            module, _, parameter = name.rpartition(".")
            if parameter in _PARAMETERS:
                first, _, rest = module.partition(".")
                model, path = (first, rest) if rest and first in ADAPTED else ("", module)
                found.setdefault(model, {})[path] = (path,)
        return found

    @cached_property
    def _dotted(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Model -> a name with dots, the base's own or of the model's code -> the modules it is."""
        found = {}
        for model, modules in self._modules.items():
            others = {} if model in TEXT_ENCODERS else dict(originals(modules))
            # transformers 5 has taken CLIP's `text_model.` away; a vision model has the same layers, and is none.
            if model in TEXT_ENCODERS or (not model and not _WORDS.isdisjoint(modules)):
                others |= {other_text(path): (path,) for path in modules}
            found[model] = others | modules
        return found

    @cached_property
    def _flat(self) -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, dict[str, list[str]]]]:
        """The same with ``_`` for ``.``; and which modules of one model have one such name."""
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        twice: dict[str, dict[str, list[str]]] = {}
        for model, names in self._dotted.items():
            flat: dict[str, tuple[str, ...]] = {}
            own = self._modules[model]
            for name in sorted(names, key=own.__contains__, reverse=True):  # its own names count first
                key = name.replace(".", "_")
                if name in own and key in flat:
                    twice.setdefault(model, {}).setdefault(key, list(flat[key])).append(name)
                flat.setdefault(key, names[name])
            found[model] = flat
        return found, twice

    def find(self, name: str) -> tuple[Place, ...]:
        """Where the weight lies that an adapter calls ``name``; empty where the base has no such weight.

        Raises
        ------
        NamingError
            When two of the base's modules have this name.
        """
        stem, _, parameter = name.rpartition(".")
        if parameter not in _PARAMETERS or not stem:
            stem, parameter = name, "weight"
        flat = "." not in stem
        for front, models in _FRONTS.items():
            if not stem.startswith(front) or (flat and not front):
                continue
            rest = stem[len(front) :]
            for model in models:
                if model not in self._modules:
                    continue
                names, twice = (self._flat[0][model], self._flat[1]) if flat else (self._dotted[model], {})
                if both := twice.get(model, {}).get(rest):
                    raise NamingError(f"weight {name}: several modules of the base have this name: {', '.join(both)}")
                if (targets := names.get(rest)) and (places := self._places(model, targets, parameter)):
                    return places
        return ()

    def _places(self, model: str, targets: tuple[str, ...], parameter: str) -> tuple[Place, ...]:
        front = f"{model}." if model else ""
        weights = [f"{front}{target.removeprefix('~')}.{parameter}" for target in targets]
        if any(weight not in self._shapes for weight in weights):
            return ()
        if len(weights) == 1:
            return (Place(weights[0], swapped=targets[0].startswith("~")),)
        places, first = [], 0
        for weight in weights:
            if not self._shapes[weight]:  # packed: how many rows it has is not known
                return ()
            stop = first + self._shapes[weight][0]
            places.append(Place(weight, first, stop))
            first = stop
        return tuple(places)

    def kohya(self, weight: str) -> str | None:
        """kohya's name of one of the base's own weights; None where that would be another's too."""
        model, _, path = weight.removesuffix(".weight").partition(".")
        if model not in self._modules:
            model, path = "", weight.removesuffix(".weight")
        if path not in self._modules.get(model, {}):
            return None
        if path.replace(".", "_") in self._flat[1].get(model, {}):
            return None
        if not model:
            weight = f"{'text_encoder' if _is_text(path) else 'unet'}.{path}"
        return kohya_name(weight, "text_encoder_2" in self._modules)


def rows_at(factor: Factor, place: Place) -> Factor:
    """The rows of a factor ``[out, ...]`` that lie at a place."""
    if place.whole:
        return factor
    count = factor.shape[0] if place.stop is None else place.stop - place.first
    half = count // 2

    def taken(array: np.ndarray) -> np.ndarray:
        rows = array[place.first : place.stop]
        return np.concatenate([rows[half:], rows[:half]]) if place.swapped else rows

    return factor.mapped(taken, (count, *factor.shape[1:]))


def delta_at(delta: LoraDelta, place: Place, shape: tuple[int, ...] | None) -> LoraDelta:
    """The update that lies at a place, as the weight of that ``shape`` takes it.

    A convolution whose kernel the file keeps flat, or whose kernel of 1 it leaves out, gets its kernel; a linear layer
    that was trained as one is a linear layer.
    """
    a, b = delta.factors
    b = rows_at(b, place)
    kind, rank = delta.kind, delta.rank
    if shape and len(shape) > 2 and kind == "linear" and int(np.prod(shape[1:])) == a.shape[1]:
        kind = "conv"
        a, b = _shaped(a, (rank, *shape[1:])), _shaped(b, (b.shape[0], rank, *(1 for _ in shape[2:])))
    elif shape and len(shape) == 2 and kind == "conv" and all(side == 1 for side in a.shape[2:]):
        kind = "linear"
        a, b = _shaped(a, a.shape[:2]), _shaped(b, b.shape[:2])
    elif b is delta.factors[1]:
        return delta
    return LoraDelta(a, b, delta.scaling, kind)


def _shaped(factor: Factor, shape: tuple[int, ...]) -> Factor:
    return factor.mapped(lambda array: array.reshape(shape), shape)


def _is_text(path: str) -> bool:
    return path.startswith(("text_model.", "encoder.layers.", "encoder.block."))
