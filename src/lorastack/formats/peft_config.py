"""adapter_config.json of PEFT: which fields change the update, and what they say of one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.core.extras import are_tokens
from lorastack.core.patterns import PatternTable
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.json_object import read_object
from lorastack.formats.opened import OpenedFile
from lorastack.formats.peft_variants import Blocks, parse_blocks
from lorastack.ways import ignoring, ways

CONFIG_NAME = "adapter_config.json"
MAX_NESTING = 20

#: Fields of peft.LoraConfig (0.21) that change training, naming or bookkeeping, but not the saved update.
_WITHOUT_EFFECT = frozenset(
    "peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode task_type target_modules "
    "exclude_modules lora_dropout layers_to_transform layers_pattern megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config velora_config monteclora_config qalora_group_size runtime_config "
    "ensure_weight_tying "
    "base_model_class parent_library merge_weights".split()
)
#: Fields that this reader honours.
_HONOURED = frozenset(
    "r lora_alpha use_rslora use_dora rank_pattern alpha_pattern target_parameters fan_in_fan_out bias lora_bias "
    "modules_to_save trainable_token_indices alora_invocation_tokens init_lora_weights use_bdlora".split()
)
#: Fields whose effect is known and not supported, and what to do instead.
_REFUSED = {
    "arrow_config": "Arrow routes every token through a choice of adapters",
    "kasa_config": "KaSA changes the base weights",
    "use_qalora": "QA-LoRA pools the input in groups",
    "layer_replication": "the adapter names layers of a base whose layers were replicated",
}
#: init_lora_weights whose start value was taken out of the base: saved as they are, they need that changed base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says of the update; ``raw`` is the whole file."""

    raw: dict[str, Any]
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    target_parameters: tuple[str, ...]
    blocks: Blocks | None = None

    @property
    def uniform(self) -> bool:
        """True when every module has the same rank and alpha, and whole factors."""
        return not self.rank_pattern and not self.alpha_pattern and not self.blocks

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its path."""
        return self.rank_pattern.first(module, self.rank) if self.rank_pattern else self.rank

    def saves(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs to a module that ``modules_to_save`` names."""
        return any(f".{module}." in f".{name}" for module in self.raw.get("modules_to_save") or ())

    def scaling_of(self, module: str) -> float:
        """alpha / rank of one module, alpha / √rank under rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.first(module, self.alpha) if self.alpha_pattern else self.alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(file: OpenedFile) -> dict[str, Any]:
    """The JSON object in a folder's adapter_config.json."""
    raw = read_object(file)
    inside, depth = _holders(raw.values()), 1
    while inside and depth < MAX_NESTING:
        inside = _holders(v for value in inside for v in (value.values() if isinstance(value, dict) else value))
        depth += 1
    if inside:
        raise FormatError(f"{file}: it is nested more than {MAX_NESTING} deep, no configuration is; fetch it again")
    return raw


def _holders(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if type(value) in (dict, list)]


def parse_config(
    raw: dict[str, Any], label: str, problems: Problems, ignore: Collection[str] = ()
) -> PeftConfig | None:
    """Check every field; adds what is wrong to ``problems`` and returns None when the rest has no meaning."""
    if isinstance(enabled := raw.get("enable_lora"), list) and enabled:  # not to be ignored: the factors are its own
        problems.add(
            f"{label}: enable_lora is {shown(enabled)}: it is an adapter of loralib's MergedLinear, as PEFT 0.1 and "
            "0.2 made for fused projections, which is not read; train it again with a later PEFT"
        )
        return None
    raw = {key: value for key, value in raw.items() if key not in ignore} if ignore else raw
    kind = raw.get("peft_type")
    if kind != "LORA":
        problems.add(f"{label}: peft_type is {shown(kind)}, only 'LORA' is a LoRA adapter; use PEFT itself for others")
        return None
    _check_fields(raw, label, problems)
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)  # PEFT's own defaults
    rank_pattern, alpha_pattern = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    before = len(problems.lines)
    for field, (good, expected) in _KINDS.items():
        if (value := raw.get(field)) and not good(value):
            problems.add(f"{label}: {field} is {shown(value)}, expected {expected}; correct the config")
    if not _whole(rank):
        problems.add(f"{label}: r is {shown(rank)}, expected a whole number above 0")
    if not _finite(alpha):
        problems.add(f"{label}: lora_alpha is {shown(alpha)}, expected a finite number")
    tables: dict[str, PatternTable[Any]] = {}
    for field, pattern, good in (
        ("rank_pattern", rank_pattern, _whole),
        ("alpha_pattern", alpha_pattern, _finite),
    ):
        if not isinstance(pattern, dict) or not all(good(value) for value in pattern.values()):
            problems.add(f"{label}: {field} is {shown(pattern)}, expected module names with numbers")
            continue
        tables[field] = PatternTable(pattern)
        deep = {key: "its brackets are nested too deeply" for key in pattern if _depth(key) > MAX_NESTING}
        for key, why in (tables[field].bad | deep).items():
            problems.add(f"{label}: {field} has {shown(key)}, which is no regular expression read here ({why})")
    blocks = parse_blocks(raw.get("use_bdlora"), label, problems)
    if len(problems.lines) > before:
        return None
    return PeftConfig(
        raw,
        rank,
        float(alpha),
        bool(raw.get("use_rslora")),
        tables["rank_pattern"],
        tables["alpha_pattern"],
        tuple(raw.get("target_parameters") or ()),
        blocks,
    )


def _depth(key: str) -> int:
    """How deep brackets are nested in a regular expression; Python's own, which PEFT uses, gives up at some depth."""
    return max(accumulate((letter == "(") - (letter == ")") for letter in key), default=0) if "(" in key else 0


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return type(value) in (bool, int)


def _token_rows(value: object) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(are_tokens(one) for one in lists)


#: Fields that are used here, with what PEFT writes in them; null, like an empty value, is the same as none.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_text, "a text"),
    "revision": (_text, "a text"),
    "task_type": (_text, "a text"),
    "bias": (_text, "none, all or lora_only"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "lora_bias": (_flag, "true or false"),
    "fan_in_fan_out": (_flag, "true or false"),
    "target_parameters": (_names, "a list of names"),
    "modules_to_save": (_names, "a list of names"),
    "alora_invocation_tokens": (are_tokens, "a list of token ids"),
    "trainable_token_indices": (_token_rows, "lists of token ids"),
}


def _check_fields(raw: dict[str, Any], label: str, problems: Problems) -> None:
    for field, value in raw.items():
        if field in _WITHOUT_EFFECT or field in _HONOURED or not value:
            continue
        why = _REFUSED.get(field)
        if why:
            problems.add(f"{label}: {field} is set: {why}, which is not supported")
        else:
            problems.add(
                f"{label}: {field} = {shown(value)} is a field not known here, which may change the result"
                + ways(ignoring(field, "if you know that it does not"))
            )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        problems.add(
            f"{label}: init_lora_weights is {start!r}: the base was changed at the start of training"
            + ways(
                "save the adapter with PEFT's path_initial_model_for_weight_conversion",
                ignoring("init_lora_weights", "if your base is that changed one"),
            )
        )


def _whole(value: object) -> bool:
    return type(value) is int and value > 0


def _finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= FLOAT32_MAX  # type: ignore[arg-type]
