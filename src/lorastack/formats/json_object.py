"""A JSON object in a file of its own: a configuration, or an index of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from lorastack.errors import FormatError
from lorastack.formats.heads import unreadable


def read_object(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises
    ------
    FormatError
        When there is none in it.
    """
    try:
        found = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise unreadable(path, "JSON", f"no JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: it is no JSON object; fetch it again")
    return found
