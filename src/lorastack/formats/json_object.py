"""A JSON object in a file of its own: a configuration, or an index of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from lorastack.errors import FormatError
from lorastack.formats.heads import unreadable
from lorastack.formats.limits import MAX_JSON, parsed_size_problem
from lorastack.formats.opened import OpenedFile


def read_object(path: str | Path | OpenedFile) -> dict[str, Any]:
    """The object in the file.

    Raises
    ------
    FormatError
        When there is none in it.
    """
    file = OpenedFile.of(path)
    if file.size > MAX_JSON:
        raise FormatError(f"{file}: it has {file.size} bytes, of JSON at most {MAX_JSON} are read; fetch it again")
    raw = file.whole()
    if problem := parsed_size_problem(raw, file.size):
        raise FormatError(f"{file}: {problem}; fetch it again")
    try:
        found = orjson.loads(raw)
    except ValueError as error:
        raise unreadable(file, "JSON", f"no JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: it is no JSON object; fetch it again")
    return found
