"""The base that an adapter says it is for, as others may be told: an id of the hub, never a path of a machine."""

from __future__ import annotations

from lorastack.core.adapter import LoadedLora
from lorastack.hub import hub_id

#: PEFT's field. In memory it may hold a path, which recipes are made again with; it is not written.
BASE = "base_model_name_or_path"
#: What adapters name a base by: that field, and a GGUF adapter's key.
SAID = (BASE, "general.base_model.0.repo_url")


def said_by(lora: LoadedLora) -> str | None:
    """What the adapter's file says, whatever it is; not the base that its names were converted with."""
    said = lora.as_loaded[1] if lora.as_loaded else lora.metadata
    return next((word for key in SAID if isinstance(word := said.get(key), str) and word), None)


def base_of(lora: LoadedLora) -> str | None:
    """The id of the base that the file says, else of that which the names were converted with."""
    return hub_id(said_by(lora)) or hub_id(lora.metadata.get(BASE))
