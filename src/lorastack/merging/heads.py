"""Heads: modules that adapters saved whole and the base's files do not have, such as a classifier in place of a head.

A base is saved as what it was trained for, mostly a language model. An adapter for another task brings the head of
that task along; with it the new base is a model of the class for that task, and its config.json says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorastack.algebra.entries import Entry
from lorastack.base.model import BaseModel
from lorastack.base.tables import live_names
from lorastack.core.factor import Factor

#: What PEFT calls a task -> transformers' table of the classes for it, by type of model.
_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


def with_heads(base: BaseModel, entries: Sequence[Entry]) -> tuple[BaseModel, Mapping[str, Any]]:
    """The base with the modules that adapters bring along, and the fields of its configuration that follow.

    As it is where they bring none, or no class is known that has them all: then they fit nowhere, which is said.
    """
    saved = {
        name: factor
        for one in entries
        if one.scale
        for name, factor in one.lora.extras.get("modules_to_save", {}).items()
        if base.shape_of(name) is None
    }
    if not saved or base.naming != "hf" or not base.stored:
        return base, {}
    names = dict.fromkeys(name for one in entries if one.scale for name in _classes(one, base))
    for fields in (fields for name in names for fields in _tried(name, saved)):
        said = live_names({**base.config, **fields})
        if said is not None and all(said.shapes.get(name) == factor.shape for name, factor in saved.items()):
            shapes = {**base.shapes, **{name: factor.shape for name, factor in saved.items()}}
            return replace(base, shapes=shapes, architecture_name=fields["architectures"][0]), fields
    return base, {}


def _classes(one: Entry, base: BaseModel) -> list[str]:
    """The classes that an adapter may have been trained with: the one it names, and that for its task."""
    said = one.lora.metadata
    found = []
    mapping = said.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        found.append(mapping["base_model_class"])
    table = _TABLES.get(str(said.get("task_type")))
    if table and importlib.util.find_spec("transformers") is not None:
        from transformers.models.auto import modeling_auto

        found.append(getattr(modeling_auto, table, {}).get(base.config.get("model_type")))
    return [name for name in found if isinstance(name, str)]


def _tried(name: str, saved: Mapping[str, Factor]) -> list[dict[str, Any]]:
    """Fields of a configuration for that class; a classifier has a row for each label, one of its arrays says how many.

    >>> import numpy as np
    >>> [sorted(fields) for fields in _tried("C", {"score.weight": Factor.of(np.ones((3, 8)), "score")})]
    [['architectures'], ['architectures', 'id2label', 'label2id']]
    """
    counts = dict.fromkeys(factor.shape[0] for factor in saved.values() if factor.shape and factor.shape[0] <= 10_000)
    labels = [{n: f"LABEL_{n}" for n in range(count)} for count in counts if count > 0]
    with_labels = [
        {"id2label": {str(n): one for n, one in each.items()}, "label2id": {one: n for n, one in each.items()}}
        for each in labels
    ]
    return [{"architectures": [name]} | fields for fields in [{}, *with_labels]]
