"""Files: input that is a regular file of a bounded size, and output that appears whole or not at all."""

from __future__ import annotations

from lorastack.files.output import MERGE_RECIPE, OutputError, check_apart, check_output, whole_output
from lorastack.files.regular import (
    below,
    bytes_in_words,
    kind_of,
    local,
    looked_into,
    nearest,
    open_regular,
    present,
    read_head,
    read_regular,
    status_of,
)
from lorastack.files.signed import CARD, FIGURES, is_signed, signed

__all__ = [
    "CARD",
    "FIGURES",
    "MERGE_RECIPE",
    "OutputError",
    "below",
    "bytes_in_words",
    "check_apart",
    "check_output",
    "is_signed",
    "kind_of",
    "local",
    "looked_into",
    "nearest",
    "open_regular",
    "present",
    "read_head",
    "read_regular",
    "signed",
    "status_of",
    "whole_output",
]
