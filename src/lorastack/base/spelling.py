"""How one weight is spelt: in files of other and older saves, in packed files, and in today's live models.

The live model's spelling is the one that counts here. transformers renames what it loads; its most common renamings
stand below, since a base is often looked at where it is not installed (`tables.py` asks it for the rest):
transformers/conversion_mapping.py (5.x) and ``_checkpoint_conversion_mapping`` (4.52 and later).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: A pattern at the beginning of a name, and what stands there in a live model.
Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), live) for pattern, live in pairs)


#: Language, vision and projector side by side at the top, as saved before transformers 4.52.
_PARTS_AT_THE_TOP = _rules(
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model.language_model."),
    (r"(vision_tower|vision_model|multi_modal_projector|image_newline)\b", r"model.\1"),
)
#: Qwen's files keep the language model where a text model has it. An adapter with such names may be of either.
_QWEN_VISION = _rules((r"visual\.", "model.visual."))
_QWEN_FILES = _rules((r"model\.(?!language_model\.|visual\.)", "model.language_model."))
_SPARSE_BLOCKS = _rules((r"(.*)\.block_sparse_moe\.", r"\1.mlp."))
_SPARSE_BLOCKS_WITH_A_ROUTER = _rules((r"(.*)\.block_sparse_moe\.gate\.", r"\1.mlp.router.")) + _SPARSE_BLOCKS
#: Granite's experts and router, which files have as layers of their own.
_GRANITE_EXPERTS = _rules(
    (r"(.*\.block_sparse_moe)\.input_linear\.weight", r"\1.experts.gate_up_proj"),
    (r"(.*\.block_sparse_moe)\.output_linear\.weight", r"\1.experts.down_proj"),
    (r"(.*\.block_sparse_moe\.router)\.layer\.", r"\1."),
)

_ADAPTER_RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        "llava llava_next llava_next_video llava_onevision vipllava paligemma gemma3 mistral3 internvl aya_vision "
        "got_ocr2 aria mllama".split(),
        _PARTS_AT_THE_TOP,
    ),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl"], _QWEN_VISION),
    **dict.fromkeys(["mixtral", "minimax", "minimax_m2"], _SPARSE_BLOCKS),
    **dict.fromkeys(["granitemoe", "granitemoeshared", "granitemoehybrid"], _GRANITE_EXPERTS),
    "phimoe": _SPARSE_BLOCKS_WITH_A_ROUTER,
}
_FILE_RULES: dict[str, tuple[Rule, ...]] = dict.fromkeys(["qwen2_vl", "qwen2_5_vl"], _QWEN_FILES)

#: Parts of a model of which it may have several: no prefix that a whole model's names lack or have.
_COMPONENTS = frozenset(
    "language_model text_model vision_tower vision_model visual audio_tower encoder decoder".split()
)
#: Where the text part of a model with pictures or sound lies.
TEXT_PARTS = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.text_model.",
    "thinker.model.",
)
#: The last part of tensors that hold a packed weight: GPTQ and AWQ, compressed-tensors, HQQ, AQLM, mxfp4, quanto.
_PACKED = re.compile(
    r"(?P<module>.+)\.(?:qweight|weight_packed|W_q|codes|weight\._data|B)"
    r"|(?P<parameter>.+)_(?:blocks|packed|qweight)"
)
#: What stands beside packed weights and is no weight by itself.
_BESIDE = re.compile(
    r".+\.(?:qzeros|scales|g_idx|weight_scale(?:_inv)?|weight_shape|weight_zero_point|weight_g_idx|SCB|weight_format|"
    r"codebooks|input_scale|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|_scale)|s|meta)|.+_scales"
)


def live_spelling(key: str, model_type: str | None) -> str:
    """What the live model calls the tensor ``key`` of a file.

    >>> live_spelling("language_model.model.layers.0.mlp.up_proj.weight", "gemma3")
    'model.language_model.layers.0.mlp.up_proj.weight'
    >>> live_spelling("model.layers.0.mlp.up_proj.weight", "llama")
    'model.layers.0.mlp.up_proj.weight'
    """
    rules = _ADAPTER_RULES.get(model_type or "", ()) + _FILE_RULES.get(model_type or "", ())
    return _renamed(key, rules)


def other_spellings(name: str, model_type: str | None, prefix: str | None, first: frozenset[str]) -> Iterator[str]:
    """What an adapter's weight may be called in the live model, beside ``name`` itself, the likeliest first.

    Parameters
    ----------
    prefix
        What the model's class puts before the names of its backbone, where that is known (``base_model_prefix``).
    first
        The first parts of the model's own names, one of which is that prefix where it is not known.
    """
    renamed = _renamed(name, _ADAPTER_RULES.get(model_type or "", ()))
    if renamed != name:
        yield renamed
    # A backbone saved by itself (feature extraction), and the other way round.
    for one in [prefix] if prefix is not None else sorted(first - _COMPONENTS):
        if one:
            yield f"{one}.{renamed}"
    top, _, rest = renamed.partition(".")
    if rest and (top == prefix if prefix is not None else top not in _COMPONENTS):
        yield rest


def packed_weight(key: str) -> str | None:
    """The weight that a tensor of a quantised file holds packed; None for any other tensor.

    >>> packed_weight("model.layers.0.mlp.up_proj.qweight"), packed_weight("model.layers.0.mlp.up_proj.weight")
    ('model.layers.0.mlp.up_proj.weight', None)
    """
    match = _PACKED.fullmatch(key)
    if match is None:
        return None
    return match["parameter"] or f"{match['module']}.weight"


def beside_packed(key: str) -> bool:
    """Whether a tensor of a quantised file goes with a packed weight: scales, zero points, tables."""
    return _BESIDE.fullmatch(key) is not None


def _renamed(name: str, rules: tuple[Rule, ...]) -> str:
    for pattern, live in rules:
        if match := pattern.match(name):
            return match.expand(live) + name[match.end() :]
    return name
