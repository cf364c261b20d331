"""Decimals: numbers with so many digits, for tables and pages."""

from __future__ import annotations


def fixed(value: float, digits: int) -> str:
    """A number with so many digits; nothing that rounds to zero has a sign.

    >>> fixed(-0.0004, 3), fixed(-0.0006, 3)
    ('0.000', '-0.001')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text
