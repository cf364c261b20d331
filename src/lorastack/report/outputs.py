"""Outputs: a report as a page, as Markdown and as pictures, measured once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from lorastack.base import BaseModel
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, Problems
from lorastack.files import check_output, signed, whole_output
from lorastack.formats.provenance import sources_of
from lorastack.report.as_markdown import Picture, Pictures, as_markdown
from lorastack.report.findings import Findings, find

if TYPE_CHECKING:
    from lorastack.report.drawings import Shown


class Outputs(NamedTuple):
    """Where each is written: the page to a file, Markdown to a file, pictures to a new folder; None for none."""

    page: Path | None = None
    markdown: Path | None = None
    svg: Path | None = None

    @property
    def places(self) -> list[Path]:
        """Those that are asked for."""
        return [place for place in self if place is not None]

    def check(self, force: bool, sources: Sequence[str | Path] = ()) -> None:
        """Refuse, all at once, what could not be written in the end."""
        problems = Problems("the report cannot be written")
        for place in self.places:
            try:
                check_output(place, force, sources)
            except ArgumentError as error:
                problems.add(error)
        if len({os.path.realpath(place) for place in self.places}) < len(self.places):
            problems.add("two of its outputs are at one place; give each its own")
        problems.raise_any(ArgumentError)


def write(
    stack: LoraStack,
    outputs: Outputs,
    base: BaseModel | str | Path | None = None,
    force: bool = False,
    *,
    intruders: bool = False,
    allow_mixed_bases: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Measure, and write what is asked for, each whole or not at all; returns the Markdown.

    Raises
    ------
    ArgumentError
        When an output exists and ``force`` is not set, or is nothing to replace.
    MissingDependencyError
        When a page or pictures are asked for, without plotly.
    """
    sources = [source for lora, _ in stack.entries for source in sources_of(lora)]
    sources += [Path(base.name if isinstance(base, BaseModel) else base)] if base is not None else []
    outputs.check(force, sources)  # before the work, not after it
    folder = outputs.page.parent if outputs.page else None
    if outputs.page or outputs.svg:  # which say what is missing before the work too
        from lorastack.report import drawings as drawings
    found = find(stack, base, intruders, progress, folder, allow_mixed_bases)
    drawn = _drawn(found) if outputs.svg else {}
    text = as_markdown(found, _pictures(drawn, outputs))
    with ExitStack() as whole:
        if outputs.svg:
            pictures = whole.enter_context(whole_output(outputs.svg, force, folder=True, sources=sources))
            for name, picture in _svgs(drawn).items():
                (pictures / name).write_bytes(signed(picture))
        if outputs.markdown:
            whole.enter_context(whole_output(outputs.markdown, force, sources=sources)).write_text(text, "utf-8")
        if outputs.page:
            whole.enter_context(whole_output(outputs.page, force, sources=sources)).write_text(_page(found), "utf-8")
    return text


def _page(found: Findings) -> str:
    from lorastack.report.page import page
    from lorastack.report.sections import sections

    return page([(one.name, one.scale) for one in found.comparison.adapters], "LoRA report", sections(found))


def _drawn(found: Findings) -> dict[str, list[Shown]]:
    """Section -> its figures."""
    from lorastack.report import drawings

    return {title: draw(found) for title, draw in drawings.SECTIONS.items()}


def _svgs(drawn: dict[str, list[Shown]]) -> dict[str, str]:
    """File -> its picture, of the figures that are drawn."""
    from lorastack.report.svg import svg

    every = [one for several in drawn.values() for one in several]
    return {one.file: svg(one.alone, one.drawing) for one in every if not isinstance(one.drawing, str)}


def _pictures(drawn: dict[str, list[Shown]], outputs: Outputs) -> Pictures:
    """The figures as seen from the Markdown."""
    if outputs.svg is None:
        return {}
    start = outputs.markdown.parent if outputs.markdown else Path()
    way = Path(os.path.relpath(outputs.svg, start)).as_posix()

    def picture(one: Shown) -> Picture:
        if isinstance(one.drawing, str):
            return Picture(None, one.title, one.drawing)
        return Picture(quote(f"{way}/{one.file}"), one.alone, one.drawing.said)

    return {title: [picture(one) for one in several] for title, several in drawn.items()}
