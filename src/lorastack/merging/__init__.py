"""Merging: a stack and its base as a new base that needs no adapters, written a block of rows at a time."""

from __future__ import annotations

from lorastack.merging.merge import Merged, merge

__all__ = ["Merged", "merge"]
