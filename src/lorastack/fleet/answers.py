"""Answers: the HTTP status that an error of ours is, the same for every engine."""

from __future__ import annotations

from lorastack.errors import LoraStackError, UnknownNameError
from lorastack.files import OutputError
from lorastack.fleet.cache import CacheFullError


def status_of(error: LoraStackError) -> int:
    """404 for a name that nobody knows, 503 where there is no room now, 400 for what cannot be held.

    >>> status_of(UnknownNameError("no adapter named zarra"))
    404
    """
    if isinstance(error, (CacheFullError, OutputError)):  # the latter: a disk that is full, or may not be written to
        return 503
    return 404 if isinstance(error, UnknownNameError) else 400
