"""Parts: the pieces of HTML that pages are made of; ``said`` and lines are HTML already, the rest is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from lorastack.report.figures import Drawing


def section(title: str, said: str, *parts: str) -> str:
    """A heading, what it is about, and the rest."""
    return f'<section><h2>{title}</h2><p class="soft">{said}</p>{"".join(parts)}</section>'


def gallery(shown: Sequence[tuple[str, Drawing | str]]) -> str:
    """Drawings side by side under their titles; what a sentence says stands above them."""
    sentences = [f"{html.escape(title)}: {html.escape(one)}" for title, one in shown if isinstance(one, str)]
    drawn = [figure(title, one) for title, one in shown if not isinstance(one, str)]
    return listing(sentences) + (f'<div class="grid">{"".join(drawn)}</div>' if drawn else "")


def alone(title: str, shown: Drawing | str) -> str:
    """One drawing, not wider than it needs; or the sentence."""
    if isinstance(shown, str):
        return f"<p>{html.escape(shown)}</p>"
    return f'<div class="narrow">{figure(title, shown)}</div>'


def figure(title: str, drawing: Drawing) -> str:
    """A drawing that the page's script makes, with what it shows in words and in a table."""
    # In a script element only "</" and "<!--" could end or hide it; JSON may write any "<" as an escape.
    data = drawing.plot.to_json().replace("<", "\\u003c")
    height = drawing.plot.layout.height
    named, said = html.escape(title), html.escape(drawing.said)
    return (
        f'<figure><h3>{named}</h3><div class="plot" role="img" aria-label="{named}: {said}" style="height:{height}px">'
        f'</div><script type="application/json" class="figure">{data}</script>'
        f"<details><summary>Numbers of this figure</summary><p>{said}</p>{numbers(title, drawing)}</details></figure>"
    )


def numbers(title: str, drawing: Drawing) -> str:
    """The table of a drawing's numbers, which scrolls by itself where it is wider than the page."""
    return _table(f"{title}: the numbers", drawing.columns, drawing.rows, "numbers")


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; where it is narrow, each row becomes a card."""
    return _table(caption, columns, rows, "cards many" if len(columns) > 8 else "cards")


def listing(lines: Sequence[str]) -> str:
    """Lines that are HTML already, below each other."""
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    def cells(row: Sequence[str]) -> Iterator[str]:
        # A long name breaks where it has a joint, before it breaks anywhere.
        yield f'<th scope="row">{html.escape(row[0]).replace(".", ".<wbr>")}</th>'
        for column, cell in zip(columns[1:], row[1:], strict=True):
            yield f'<td data-label="{html.escape(column)}">{html.escape(cell)}</td>'

    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(cells(row))}</tr>" for row in rows)
    named = html.escape(caption)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{named}"><table class="{kind}">'
        f"<caption>{named}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
