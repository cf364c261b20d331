"""What to say of weights that find no place: that it is the wrong base, or under which prefix they would fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorastack.base.model import BaseModel
from lorastack.base.parts import DENOISERS, FRONTS, ONLY_OF_IMAGES, part_of
from lorastack.core.adapter import LoadedLora
from lorastack.ways import Way, rename, ways

#: Of an adapter that fits nowhere at all, so many weights are named.
_NAMED = 10
_WHOLE = Way("give the pipeline that has it", "give the pipeline that has it")


def in_short(lines: Sequence[str], lora: LoadedLora, base: BaseModel) -> list[str]:
    """The lines on weights that do not fit; where none does, it is the wrong base: that in a line, and the first ten.

    >>> from lorastack import LoadedLora
    >>> import numpy as np
    >>> lora = LoadedLora.from_tensors({f"h.{n}.q.weight": (np.ones((1, 3)), np.ones((2, 1))) for n in range(12)})
    >>> base = BaseModel("mine", "hf", "LlamaForCausalLM", {}, {"model.norm.weight": (2,)})
    >>> said = in_short([f"weight {name} is none of the base's" for name in lora.adapters], lora, base)
    >>> said[0], len(said), said[-1]
    ('0 of 12 weights fit; the base is a LlamaForCausalLM', 12, 'and 2 more')
    """
    if len(lines) < max(3, len(lora.adapters)):
        return list(lines)
    said = lora.metadata.get("base_model_name_or_path") or lora.metadata.get("general.architecture")
    trained = f"this adapter says it was trained on {said}, " if isinstance(said, str) and said else ""
    kind = base.architecture_name or base.name
    head = f"0 of {len(lora.adapters)} weights fit; {trained}the base is {_a(kind)}"
    more = len(lines) - _NAMED
    return [head, *lines[:_NAMED], *([f"and {more} more"] if more > 0 else [])]


def _a(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeio' else 'a'} {word}"


def elsewhere(strangers: Sequence[str], lora: LoadedLora, base: BaseModel) -> str:
    """A line that says under which prefix most of these weights would fit, and how; empty when under none.

    >>> from lorastack import LoadedLora
    >>> import numpy as np
    >>> lora = LoadedLora.from_tensors({"model.layers.0.q.weight": (np.ones((1, 3)), np.ones((2, 1)))})
    >>> base = BaseModel("vlm", "hf", None, {}, {"model.language_model.layers.0.q.weight": (2, 3)})
    >>> elsewhere(list(lora.adapters), lora, base).partition(";")[0]
    '1 of 1 would fit under model.language_model'
    """
    if not strangers or base.naming != "hf":
        return ""
    counts: Counter[tuple[str, str]] = Counter()
    endings: dict[str, list[str]] = {}
    for own in base.shapes:
        endings.setdefault(_ending(own), []).append(own)
    for name in strangers:
        for own in endings.get(_ending(name), ()):
            pair = _prefixes(name, own)
            if pair is not None and base.misfit(own, lora.adapters[name]) is None:
                counts[pair] += 1
    if not counts:
        return ""
    # Of several the one that serves most; then the plainest.
    (old, new), fits = min(counts.items(), key=lambda item: (-item[1], item[0][0].count("."), item[0]))
    return f"{fits} of {len(strangers)} would fit under {new or 'the top'}{ways(rename(old, new))}"


def of_other_parts(strangers: Sequence[str], base: BaseModel) -> dict[str, str]:
    """A line for each part of an image pipeline that strangers are of and the base lacks; part -> line.

    >>> base = BaseModel("mine", "hf", "UNet2DConditionModel", {}, {"mid_block.resnets.0.conv1.weight": (2, 2, 3, 3)})
    >>> of_other_parts(["text_encoder.text_model.a.weight", "text_encoder.text_model.b.weight"], base)["text_encoder"]
    ... # doctest: +ELLIPSIS
    "2 weights are of text_encoder, which is no part of UNet2DConditionModel; give the pipeline that has it, or ..."
    """
    known = FRONTS if base.parts else ONLY_OF_IMAGES
    counts = Counter(part for name in strangers if (part := part_of(name)) in known and part not in base.parts)
    own = next((part for part in DENOISERS if part in base.parts), base.parts[0] if base.parts else "unet") + ".*"
    if any(name.startswith("lora_te") for name in strangers):
        own = "lora_unet_*"
    out = ways(_WHOLE, Way(f"leave them out with select({own!r})", None))
    kind = base.architecture_name or base.name
    return {
        str(part): f"{count} weight{'s are' if count > 1 else ' is'} of {part}, which is no part of {kind}{out}"
        for part, count in counts.items()
    }


def _ending(name: str) -> str:
    """The last parts of a name, from its layer's number on: what renamings leave alone."""
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), max(len(parts) - 2, 0))
    return ".".join(parts[at:])


def _prefixes(name: str, own: str) -> tuple[str, str] | None:
    """What stands in ``name`` before the parts it shares with ``own``, and what stands there in ``own``."""
    one, two = name.split("."), own.split(".")
    shared = 0
    while shared < min(len(one), len(two)) and one[-1 - shared] == two[-1 - shared]:
        shared += 1
    old, new = one[: len(one) - shared], two[: len(two) - shared]
    # A renaming replaces whole parts at the front; where nothing is left of one of the two, a part is put before both.
    if not old or not new:
        if len(one) == shared or not one:
            return None
        old, new = one[: len(old) + 1], two[: len(new) + 1]
    return ".".join(old), ".".join(new)
