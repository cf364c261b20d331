"""Colours: those of figures in light and dark, one home for the page's script and for pictures of their own."""

from __future__ import annotations

from typing import NamedTuple


class Scheme(NamedTuple):
    """What a figure is drawn in; scales are (share, colour) from their low end to the high one."""

    paper: str
    ink: str
    line: str
    diverging: tuple[tuple[float, str], ...]
    sequential: tuple[tuple[float, str], ...]
    #: Hues that tell apart also for colour-blind eyes (after Okabe and Ito), at least 3 to 1 on the paper.
    lines: tuple[str, ...]


LIGHT = Scheme(
    paper="#f5f6f8",
    ink="#1c1e21",
    line="#d9dce1",
    diverging=((0, "#a8321a"), (0.25, "#ec9a80"), (0.5, "#ffffff"), (0.75, "#7db8dd"), (1, "#0b5a92")),
    sequential=((0, "#f4f8f6"), (0.5, "#6dbfb6"), (1, "#0b3c5d")),
    lines=("#0072b2", "#a86a00", "#00795a", "#b0527f", "#6a51a3", "#c24e00"),
)
DARK = Scheme(
    paper="#1d2026",
    ink="#e6e8eb",
    line="#343942",
    diverging=((0, "#ff8f6b"), (0.25, "#a8432a"), (0.5, "#2a2d34"), (0.75, "#1f6ea3"), (1, "#7cc7ff")),
    sequential=((0, "#22262e"), (0.5, "#1f7a8c"), (1, "#d5f5e3")),
    lines=("#5aa5de", "#e69f00", "#00b386", "#d98bb3", "#a898e8", "#ff7a33"),
)
#: Of two inks on a coloured cell the one that stands out more has at least 4.58 to 1, on any colour.
INKS = ("#000000", "#ffffff")


def mixed(scale: tuple[tuple[float, str], ...], share: float) -> str:
    """The colour at a share of a scale.

    >>> mixed(((0, "#000000"), (1, "#ff8000")), 0.5)
    '#804000'
    """
    at = next((n for n, (end, _) in enumerate(scale) if n and share <= end), len(scale) - 1)
    (low, first), (high, last) = scale[at - 1], scale[at]
    part = (share - low) / (high - low)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(_rgb(first), _rgb(last), strict=True))


def ink_on(colour: str) -> str:
    """Black or white.

    >>> ink_on("#ffffff"), ink_on("#0b3c5d")
    ('#000000', '#ffffff')
    """
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (n / 255 for n in _rgb(colour))]
    light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return INKS[(light + 0.05) ** 2 <= 1.05 * 0.05]


def _rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
