"""The parts of an image pipeline, and what adapters put before the names of their weights.

The front is the pipeline's own name for the part, as diffusers has it (``unet.``, ``text_encoder_2.``). An adapter may
lack it where it was saved for the one model, and may have it where that model is given by itself. CLIP's text encoder
is ``text_model`` inside its class in some versions of transformers, and the class itself in others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

#: The models that remove noise, the likeliest first: what a name without a front is of.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
#: Those whose front says that a weight is of a pipeline: the decoder of a language model is called so too.
ADAPTED = (*(one for one in DENOISERS if one != "decoder"), *TEXT_ENCODERS)
#: What a pipeline calls its models; others it names itself.
FRONTS = frozenset((*DENOISERS, *TEXT_ENCODERS, "vae", "image_encoder", "controlnet", "safety_checker"))
#: Those that no other kind of model has as the front of its names.
ONLY_OF_IMAGES = frozenset(("unet", "vae", *TEXT_ENCODERS))
#: Fronts of kohya's names; its ``lora_unet_`` is any model that removes noise.
_KOHYA = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_INNER, _WORDS = "text_model.", "embeddings.token_embedding.weight"


def part_of(name: str) -> str | None:
    """The part of a pipeline that a weight's name says it is of; None where it says none.

    >>> part_of("text_encoder_2.text_model.final_layer_norm.weight"), part_of("mid_block.resnets.0.conv1.weight")
    ('text_encoder_2', None)
    """
    front = name.partition(".")[0]
    if front in FRONTS:
        return front
    return next((part for front, part in _KOHYA.items() if name.startswith(front)), None)


def in_pipeline(name: str, parts: Sequence[str]) -> Iterator[str]:
    """What a pipeline of these parts may call the weight that an adapter calls ``name``, the likeliest first."""
    front, _, rest = name.partition(".")
    if front in parts or front in FRONTS:
        yield f"{front}.{other_text(rest)}"
        return
    for part in (one for one in DENOISERS if one in parts):
        yield f"{part}.{name}"


def in_text_encoder(name: str, shapes: Collection[str]) -> Iterator[str]:
    """What a text encoder that is given by itself, with weights of these names, may call the weight ``name``."""
    front, _, rest = name.partition(".")
    if front in TEXT_ENCODERS:
        yield rest
        name = rest
    if f"{_INNER}{_WORDS}" in shapes or _WORDS in shapes:  # CLIP's, and no vision model, which has the same layers
        yield other_text(name)


def other_text(name: str) -> str:
    """The name of a weight of a text model in a class that holds it, or the other way round.

    >>> other_text("text_model.final_layer_norm.weight"), other_text("final_layer_norm.weight")
    ('final_layer_norm.weight', 'text_model.final_layer_norm.weight')
    """
    return name[len(_INNER) :] if name.startswith(_INNER) else _INNER + name
