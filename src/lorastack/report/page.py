"""Page: the frame of every page, its styles and its script; one HTML file with nothing to fetch."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from lorastack.errors import require
from lorastack.report.colours import DARK, LIGHT

_offline: Any = require("plotly.offline", "report")

#: Nothing is loaded from anywhere, whatever a name or plotly might ask for.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
#: Letters of a title: more are no title any more.
_TITLE, _NAME = 80, 24


def page(mixture: Iterable[tuple[str, float]], kind: str, body: str) -> str:
    """A whole page as HTML: its title is the mixture, and what ``kind`` of page it is.

    A mixture that is shortened in the title stands below it in full.
    """
    entries = list(mixture)
    title, whole = html.escape(title_of(entries)), html.escape(_written(entries))
    below = "" if title == whole else f'<p class="soft mixture">{whole}</p>'
    here = files("lorastack.report")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – {html.escape(kind)}</title>
<style>
{here.joinpath("page.css").read_text("utf-8")}</style>
<noscript><style>.plot {{ display: none; }}</style></noscript>
</head>
<body>
<main>
<h1>{title}</h1>
{below}
<noscript><p>The plots need JavaScript; their numbers are in the tables below them, which do not.</p></noscript>
{body}
</main>
<script>{_offline.get_plotlyjs()}</script>
<script>
const COLOURS = {_colours()};
{here.joinpath("page.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _colours() -> str:
    return json.dumps({"light": LIGHT._asdict(), "dark": DARK._asdict()})


def title_of(entries: list[tuple[str, float]]) -> str:
    """A mixture in at most some eighty letters: the middle of long names left out, then the last adapters.

    >>> title_of([("luna", 0.7), ("robot", 0.3)]), title_of([("a" * 90, -1.0)])
    ('luna:0.7 + robot:0.3', 'aaaaaaaaaaa…aaaaaaaaaaaa:-1')
    >>> title_of([(f"adapter{n}", 1.0) for n in range(40)])
    'adapter0:1 + adapter1:1 + adapter2:1 + adapter3:1 + adapter4:1 + 35 more'
    """
    if len(text := _written(entries)) <= _TITLE:
        return text
    short = [(f"{name[:11]}…{name[-12:]}" if len(name) > _NAME else name, scale) for name, scale in entries]
    shown = len(short)
    while shown > 1 and len(_written(short[:shown])) > _TITLE - len(" + 99 more") * (shown < len(short)):
        shown -= 1
    return _written(short[:shown]) + (f" + {len(short) - shown} more" if shown < len(short) else "")


def _written(entries: list[tuple[str, float]]) -> str:
    return " + ".join(f"{name}:{scale:.4g}" for name, scale in entries)
