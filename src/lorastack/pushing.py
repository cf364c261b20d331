"""An adapter on the hub: a PEFT folder with a model card, which says what it was made of."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lorastack import formats
from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError, LoraStackError
from lorastack.formats.provenance import Ingredient, Provenance
from lorastack.markdown import in_a_cell

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BASE = "base_model_name_or_path"


class PushError(LoraStackError, OSError):
    """The hub did not take the adapter."""


def push_to_hub(lora: LoadedLora, repo: str, *, private: bool = False, dtype: str | None = None) -> str:
    """Upload ``lora`` as a PEFT folder with a card to ``repo`` (``owner/name``), which is made if need be; its address.

    The token is the one that ``huggingface_hub`` finds. Paths of this machine are not sent: neither in the card, nor in
    the configuration, nor as a recipe.

    Raises
    ------
    ArgumentError
        When ``repo`` is no ``owner/name``.
    FormatError
        Listing what a PEFT folder cannot hold; nothing is uploaded then.
    PushError
        When the hub refuses, or cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ArgumentError(f"{repo!r} is no repository; write owner/name")
    import huggingface_hub as hub

    base = hub_base(lora)
    said = {key: value for key, value in lora.metadata.items() if key != _BASE} | ({_BASE: base} if base else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        formats.save(replace(lora, metadata=MappingProxyType(said)), folder, format="peft", dtype=dtype, recipe=False)
        (folder / "README.md").write_text(card(lora, base), encoding="utf-8")
        try:
            client = hub.HfApi()
            client.create_repo(repo, private=private, exist_ok=True)
            client.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {lora.name}")
        except Exception as error:  # the client raises its own errors, and those of its HTTP library
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise PushError(f"{repo}: the hub did not take {lora.name}: {first}") from error
    return f"https://huggingface.co/{repo}"


def hub_base(lora: LoadedLora) -> str | None:
    """The base that the adapter names, where it is an id of the hub and no path of a machine."""
    said = lora.metadata.get(_BASE)
    return said if isinstance(said, str) and _REPOSITORY.fullmatch(said) and not Path(said).exists() else None


def card(lora: LoadedLora, base: str | None) -> str:
    """The text of README.md."""
    name = in_a_cell(lora.name)
    lines = ["---", "library_name: peft", *([f"base_model: {base}"] if base else [])]
    lines += ["tags:", "- lora", "- lorastack", "---", "", f"# {name}", ""]
    lines += [
        f"A LoRA adapter of rank {lora.rank} for {lora.num_adapters()} weights" + (f" of {base}." if base else ".")
    ]
    made = Provenance.of_lora(lora)
    if lora.origin:
        lines += ["", "It is the sum of these, baked with LoraStack:", "", "| adapter | scale |", "|---|---|"]
        lines += [f"| {in_a_cell(_called(one))} | {one.scale:g} |" for one in made.ingredients]
    settings = [f"{key} {value}" for key, value in made.made.items() if isinstance(value, (int, float))]
    lines += ["", f"Settings: {', '.join(settings)}."] if settings else []
    return "\n".join(lines) + "\n"


def _called(one: Ingredient) -> str:
    return one.name or Path(one.source).name
