"""Extracting: the difference of two models as an adapter, read and decomposed a weight at a time."""

from __future__ import annotations

from lorastack.extracting.new_adapter import extract

__all__ = ["extract"]
