"""Words for numbers: what a cosine, a pile-up or an error means to somebody who adds adapters."""

from __future__ import annotations

import math

from lorastack.decimals import fixed


def of_cosine(cosine: float) -> str:
    """What it means for the sum of two adapters.

    >>> of_cosine(0.93), of_cosine(-0.9)
    ('nearly the same direction: together they overshoot', 'they cancel: little of either is left')
    >>> of_cosine(0.02)
    'independent: each does what it does alone'
    """
    if math.isnan(cosine):
        return "one of them changes nothing"
    size, up = abs(cosine), cosine > 0
    if size >= 0.99:
        return "practically the same update" if up else "one undoes the other"
    if size >= 0.8:
        return "nearly the same direction: together they overshoot" if up else "they cancel: little of either is left"
    if size >= 0.3:
        return "they share much and pile up" if up else "they cancel in part"
    if size >= 0.1:
        return "they share a little and pile up a little" if up else "they work against each other a little"
    return "independent: each does what it does alone"


def cosine(value: float) -> str:
    """Two decimals, with a true minus.

    >>> cosine(0.934), cosine(-0.5), cosine(-0.001), cosine(float("nan"))
    ('0.93', '−0.50', '0.00', '–')
    """
    return "–" if math.isnan(value) else fixed(value, 2).replace("-", "−")


def of_overlap(overlap: float, chance: float) -> str:
    """A shared part of two spaces, against what chance gives: ``0.21 (chance 0.12)``.

    >>> of_overlap(0.214, 0.12), of_overlap(float("nan"), 0.0)
    ('0.21 (chance 0.12)', '–')
    """
    return "–" if math.isnan(overlap) else f"{overlap:.2f} (chance {chance:.2f})"


def of_pileup(kept: float, independent: float) -> str:
    """What is left of two norms in their sum, against what independent updates of these norms have.

    >>> of_pileup(0.65, 0.7071), of_pileup(float("nan"), float("nan"))
    ('65.0 % (70.7 % if independent)', '–')
    """
    return "–" if math.isnan(kept) else f"{percent(kept)} ({percent(independent)} if independent)"


def of_error(error: float) -> str:
    """What a bake with that relative error is.

    >>> of_error(0.0), of_error(0.004), of_error(0.3)
    ('nothing lost', 'as good as exact', 'a good part is lost: check it')
    """
    if error < 1e-6:
        return "nothing lost"
    if error < 0.01:
        return "as good as exact"
    if error < 0.1:
        return "a little lost"
    return "a good part is lost: check it" if error < 0.5 else "most of what it did may be gone"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a dash for no number.

    >>> number(12.3456), number(0.000012345), number(None), number(float("nan")), number(1234.5)
    ('12.3', '1.23e-05', '–', '–', '1,234')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share in percent.

    >>> percent(0.0314), percent(0.00002), percent(0.0), percent(None)
    ('3.1 %', '0.002 %', '0 %', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if abs(value) >= 0.01 else f"{100 * value:.1g} %"


def count(many: int, what: str) -> str:
    """So many of something.

    >>> count(1, "layer"), count(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{many} {what}" if many == 1 else f"{many} {what}s"


def few(values: list[int] | list[float], most: int = 6) -> str:
    """A list, or its ends where it is long.

    >>> few([4, 8]), few(list(range(1, 9)))
    ('4, 8', '1 to 8')
    """
    return ", ".join(f"{v:g}" for v in values) if len(values) <= most else f"{values[0]:g} to {values[-1]:g}"
