"""Merging: a stack and its base as a new base that needs no adapters, written a block of rows at a time."""

from __future__ import annotations

from lorastack.merging.new_base import Merged, merge

__all__ = ["Merged", "merge"]
