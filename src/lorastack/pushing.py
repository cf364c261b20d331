"""An adapter on the hub: a PEFT folder with its card, which says what it was made of."""

from __future__ import annotations

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lorastack import formats
from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError, LoraStackError

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class PushError(LoraStackError, OSError):
    """The hub did not take the adapter."""


def can_draw() -> bool:
    """Whether figures are drawn where nobody says: a card is looked at, but goes without them."""
    return find_spec("plotly") is not None


def push_to_hub(
    lora: LoadedLora, repo: str, *, private: bool = False, dtype: str | None = None, figures: bool | None = None
) -> str:
    """Upload ``lora`` as a PEFT folder with a card to ``repo`` (``owner/name``), which is made if need be; its address.

    The token is the one that ``huggingface_hub`` finds. Paths of this machine are not sent: neither in the card, nor in
    the configuration, nor as a recipe.

    Parameters
    ----------
    figures
        Draw for the card, as `lorastack.save` does; when not given, where plotly is installed.

    Raises
    ------
    ArgumentError
        When ``repo`` is no ``owner/name``.
    FormatError
        Listing what a PEFT folder cannot hold; nothing is uploaded then.
    MissingDependencyError
        For ``figures=True`` without plotly.
    PushError
        When the hub refuses, or cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ArgumentError(f"{repo!r} is no repository; write owner/name")
    import huggingface_hub as hub

    with tempfile.TemporaryDirectory() as scratch:
        folder = formats.save(
            lora,
            Path(scratch) / "adapter",
            format="peft",
            dtype=dtype,
            recipe=False,
            figures=can_draw() if figures is None else figures,
            place=repo,
        )
        try:
            client = hub.HfApi()
            client.create_repo(repo, private=private, exist_ok=True)
            client.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {lora.name}")
        except Exception as error:  # the client raises its own errors, and those of its HTTP library
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise PushError(f"{repo}: the hub did not take {lora.name}: {first}") from error
    return f"https://huggingface.co/{repo}"
