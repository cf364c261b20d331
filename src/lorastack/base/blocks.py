"""Block weights of image adapters, in the habit of A1111 and ComfyUI (``lbw``): a number for each block of the model.

A UNet's blocks are counted as the first code counts them: IN00 to IN11, M00, OUT00 to OUT11; those of Flux are D00 to
D18 and S00 to S37. BASE is all text encoders. The lists and presets are those of sd-webui-lora-block-weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from lorastack.core.adapter import LoadedLora
from lorastack.core.patterns import Pattern
from lorastack.errors import ArgumentError, Problems, UnknownNameError, did_you_mean, shown

_IN, _OUT = [f"IN{n:02}" for n in range(12)], [f"OUT{n:02}" for n in range(12)]
_FLUX = [*(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38))]
#: How many numbers a list has -> whose they are. The short ones leave out blocks in which a LoRA changes nothing.
LAYOUTS: Mapping[int, Sequence[str]] = {
    12: ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[:6]],
    17: ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[3:]],
    20: ["BASE", *_IN[:9], "M00", *_OUT[:9]],
    26: ["BASE", *_IN, "M00", *_OUT],
    57: _FLUX,
    61: ["CLIP", "T5", "IN", *_FLUX, "OUT"],
}
_WHOSE = {12: "SDXL", 17: "SD 1.5", 20: "SDXL with convolutions", 26: "any UNet", 57: "Flux", 61: "Flux whole"}
#: Preset -> the blocks of a UNet that are at 1, from the first to the last; the others are at 0. The lists of 17 that
#: these are known by say nothing of the other blocks (convolutions, some of SDXL's), which are as those beside.
_AT_ONE: Mapping[str, tuple[str, str]] = {
    "INS": ("IN00", "IN04"),
    "IND": ("IN05", "IN11"),
    "INALL": ("IN00", "IN11"),
    "MIDD": ("IN05", "OUT06"),
    "OUTD": ("OUT00", "OUT06"),
    "OUTS": ("OUT07", "OUT11"),
    "OUTALL": ("OUT00", "OUT11"),
}
#: Preset -> the one number of every block, of any model.
_EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
PRESETS = (*_EVERYWHERE, *_AT_ONE)

_S = r"[._]"
_FRONT = rf"(?:(?:lora_unet|lycoris|lora_transformer|unet|transformer|diffusion_model|model\.diffusion_model){_S})?"
_Block = Callable[[re.Match[str]], str]


def _rule(pattern: str, block: _Block) -> tuple[re.Pattern[str], _Block]:
    return re.compile(pattern.replace("_S", _S).replace("^", _FRONT, 1)), block


def _number(match: re.Match[str], group: str) -> int:
    return int(match[group])


#: The front of a weight's name, by any spelling, and the block it is of; the first that matches counts. ComfyUI and
#: diffusers write dots where kohya has "_".
_RULES = [
    _rule(r"^input_blocks_S(?P<n>\d{1,2})_S", lambda m: f"IN{_number(m, 'n'):02}"),
    _rule(r"^output_blocks_S(?P<n>\d{1,2})_S", lambda m: f"OUT{_number(m, 'n'):02}"),
    _rule(r"^(?:middle|mid)_block_S", lambda m: "M00"),
    _rule(r"^conv_in(?=_S|$)", lambda m: "IN00"),
    _rule(
        r"^down_blocks_S(?P<b>\d)_S(?:attentions|resnets)_S(?P<n>\d)_S",
        lambda m: f"IN{3 * _number(m, 'b') + _number(m, 'n') + 1:02}",
    ),
    _rule(r"^down_blocks_S(?P<b>\d)_Sdownsamplers_S", lambda m: f"IN{3 * _number(m, 'b') + 3:02}"),
    _rule(
        r"^up_blocks_S(?P<b>\d)_S(?:attentions|resnets)_S(?P<n>\d)_S",
        lambda m: f"OUT{3 * _number(m, 'b') + _number(m, 'n'):02}",
    ),
    _rule(r"^up_blocks_S(?P<b>\d)_Supsamplers_S", lambda m: f"OUT{3 * _number(m, 'b') + 2:02}"),
    _rule(r"^(?:double_blocks|transformer_blocks)_S(?P<n>\d{1,2})_S", lambda m: f"D{_number(m, 'n'):02}"),
    _rule(r"^(?:single_blocks|single_transformer_blocks)_S(?P<n>\d{1,2})_S", lambda m: f"S{_number(m, 'n'):02}"),
    _rule(r"(?:lora_te\d?_|text_encoder(?:_\d)?[._]|text_encoders?\.\w{1,20}\.)", lambda m: "BASE"),
]
_FLUX_ENDS = [
    _rule(r"^(?:img|txt|time|vector|guidance)_in_S", lambda m: "IN"),
    _rule(r"^(?:x_embedder|context_embedder|time_text_embed)_S", lambda m: "IN"),
    _rule(r"^(?:final_layer|norm_out|proj_out)_S", lambda m: "OUT"),
]
#: What only T5 has in its names.
_T5 = re.compile(r"encoder[._]block[._]\d{1,2}[._]layer[._]")


def block_weights(lora: LoadedLora | Iterable[str], weights: str | Sequence[float]) -> dict[Pattern, float]:
    """Block weights as patterns with factors, for `LoadedLora.scaled`: one for each block that the adapter has.

    Names are kohya's, ComfyUI's or diffusers', for SD 1.x, SDXL and Flux. What is in no block, such as the layers of
    the time, has no pattern and stays as it is, as it does in A1111.

    Parameters
    ----------
    lora
        The adapter, or its weights' names.
    weights
        A preset: ALL, NONE, ALL0.5, or of a UNet INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL. Or numbers, also as
        text with commas: 17 for SD 1.5, 12 or 20 for SDXL, 26 for any UNet, 57 (D00 to S37) or 61 (CLIP, T5, IN
        before, OUT behind) for Flux.

    Raises
    ------
    UnknownNameError
        When there is no such preset.
    ArgumentError
        When there is no list of so many numbers, one is no finite number, the adapter has no block, or it has blocks
        that the list has no number for; each of them is named.

    Examples
    --------
    >>> names = ["lora_unet_down_blocks_1_attentions_0_proj_in", "unet.up_blocks.1.attentions.0.proj_in.weight"]
    >>> block_weights([*names, "lora_te_text_model_encoder_layers_0_mlp_fc1"], "INALL")
    {'lora_unet_down_blocks_1_attentions_0_*': 1.0, 'unet.up_blocks.1.attentions.0.*': 0.0, 'lora_te_*': 1.0}
    """
    names = list(lora.adapters) if isinstance(lora, LoadedLora) else list(lora)
    patterns = _patterns(names)
    if not patterns:
        raise ArgumentError(
            f"no weight is of a block of a UNet or of Flux, such as {names[0] if names else 'none'}; they are for "
            "adapters of Stable Diffusion 1.x, SDXL and Flux"
        )
    factors = _factors(weights)
    if isinstance(factors, float):
        return {pattern: factors for pattern in patterns}  # noqa: C420
    missing = sorted({block for block in patterns.values() if block not in factors})
    if missing:
        raise ArgumentError(
            f"these {len(factors)} block weights have no number for {', '.join(missing)}, which the adapter has; give "
            + " or ".join(f"{count} numbers ({_WHOSE[count]})" for count in _enough(patterns.values()))
        )
    return {pattern: factors[block] for pattern, block in patterns.items()}


def block_of(name: str, flux: bool = False) -> tuple[str, str] | None:
    """(block, front of the name that says so) of a weight; None for one that is in no block.

    >>> block_of("lora_unet_input_blocks_10_1_proj_in"), block_of("unet.time_embedding.linear_1.weight")
    (('IN10', 'lora_unet_input_blocks_10_'), None)
    """
    for pattern, block in (*_RULES, *(_FLUX_ENDS if flux else ())):
        if match := pattern.match(name):
            said = block(match)
            if said == "BASE" and flux:
                said = "T5" if _T5.search(name) else "CLIP"
            return said, match[0]
    return None


def _patterns(names: Sequence[str]) -> dict[str, str]:
    """Pattern -> block, of those that the weights are in."""
    found = {name: one for name in names if (one := block_of(name))}
    if any(block[0] in "DS" and block[1:].isdigit() for block, _ in found.values()):
        found = {name: one for name in names if (one := block_of(name, flux=True))}
    if all(block == "BASE" for block, _ in found.values()):
        return {}
    return {f"{front}*": block for block, front in found.values()}


def _factors(weights: str | Sequence[float]) -> Mapping[str, float] | float:
    """Block -> factor, or the one of all."""
    if isinstance(weights, str) and "," not in weights:
        if weights in _EVERYWHERE:
            return _EVERYWHERE[weights]
        if weights not in _AT_ONE:
            raise UnknownNameError(
                f"there are no block weights {shown(weights)}; presets are {', '.join(PRESETS)}"
                f"{did_you_mean(weights, PRESETS)}"
            )
        first, last = (LAYOUTS[26].index(block) for block in _AT_ONE[weights])
        return {block: float(block == "BASE" or first <= n <= last) for n, block in enumerate(LAYOUTS[26])}
    given: list[str | float] = [*weights.split(",")] if isinstance(weights, str) else list(weights)
    if len(given) not in LAYOUTS:
        raise ArgumentError(
            f"there are {len(given)} block weights; expected "
            + ", ".join(f"{count} ({whose})" for count, whose in _WHOSE.items())
        )
    problems = Problems("block weights are finite numbers")
    factors: dict[str, float] = {}
    for block, said in zip(LAYOUTS[len(given)], given, strict=True):
        try:
            factors[block] = float(said)
        except (TypeError, ValueError):
            factors[block] = float("nan")
        if not abs(factors[block]) < float("inf"):
            problems.add(f"{block} is {shown(said)}")
    problems.raise_any(ArgumentError)
    return factors


def _enough(blocks: Iterable[str]) -> list[int]:
    """The lists that have a number for each of these blocks."""
    wanted = set(blocks)
    return [count for count, ids in LAYOUTS.items() if wanted <= set(ids)]
