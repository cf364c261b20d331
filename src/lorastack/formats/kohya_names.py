"""Which name kohya has for a weight: its path with ``_`` for ``.`` behind the front of the model that it is in."""

from __future__ import annotations

from collections.abc import Collection

#: A pipeline's model -> kohya's front; the first text encoder has a number where there are several.
_FRONTS = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "diffusion_model": "lora_unet_",
}
_T5 = ("encoder_block_", "encoder_final", "shared")


def kohya_name(weight: str, several_text: bool = False) -> str | None:
    """kohya's name of a weight of a pipeline's model; None for any other.

    Parameters
    ----------
    several_text
        Whether the pipeline has more than one text encoder.

    >>> kohya_name("unet.mid_block.attentions.0.proj_in.weight"), kohya_name("model.layers.0.q.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', None)
    >>> kohya_name("text_encoder.encoder.layers.0.mlp.fc1.weight", several_text=True)
    'lora_te1_text_model_encoder_layers_0_mlp_fc1'
    """
    model, _, path = weight.removesuffix(".weight").partition(".")
    front = _FRONTS.get(model)
    if front is None or not path:
        return None
    flat = path.replace(".", "_")
    if model.startswith("text_encoder"):
        front = "lora_te1_" if model == "text_encoder" and several_text else front
        # transformers 5 has taken the name of CLIP's outer module away.
        if not flat.startswith(("text_model_", "text_projection", *_T5)):
            flat = f"text_model_{flat}"
    return front + flat


def has_several_text(weights: Collection[str]) -> bool:
    """Whether there are weights of a second text encoder among these."""
    return any(weight.startswith(("text_encoder_2.", "text_encoder_3.")) for weight in weights)
