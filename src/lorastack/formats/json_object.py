"""A JSON object in a file of its own: a configuration, or an index of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from lorastack.errors import FormatError
from lorastack.files import read_regular
from lorastack.formats.heads import unreadable

#: Configurations and indexes have less.
MAX_JSON = 1 << 26


def read_object(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises
    ------
    FormatError
        When there is none in it.
    """
    try:
        found = orjson.loads(read_regular(path, MAX_JSON))
    except ValueError as error:
        raise unreadable(path, "JSON", f"no JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: it is no JSON object; fetch it again")
    return found
