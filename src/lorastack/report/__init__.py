"""Pages with plots, pictures and Markdown; the only package that imports plotly, and not for Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorastack.base import BaseModel

if TYPE_CHECKING:
    from lorastack.core.stack import LoraStack

__all__ = ["report"]


def report(
    stack: LoraStack,
    path: str | Path,
    base: BaseModel | str | Path | None = None,
    force: bool = False,
    *,
    markdown: str | Path | None = None,
    svg: str | Path | None = None,
    intruders: bool = False,
    allow_mixed_bases: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write one page about a stack: what is in each adapter, where they meet, what a bake at a rank would lose.

    The page holds everything it shows, the plotting library too: open it anywhere, without a network.

    Parameters
    ----------
    stack
        At least one adapter. Those known by (target module, layer) need the base.
    path
        The file to write.
    base
        The model they are for, or where it is: norms are then also given as a share of its weights'.
    force
        Replace a file that exists, and a folder of pictures that nobody changed.
    markdown
        A file to write too: the words and tables for a card or a pull request, with links to the pictures.
    svg
        A new folder to write too: every figure as a picture of its own, in light and dark.
    intruders
        Look for intruder dimensions too, where there is a base: every weight of it is decomposed, which takes from
        seconds to minutes each the first time.
    allow_mixed_bases
        Without a base: measure also what names different bases or shares no weight.
    progress
        Called with the weights done and the weights there are; each counts twice.

    Raises
    ------
    ArgumentError
        When the stack is empty, or the file exists and ``force`` is not set.
    NamingError
        Listing the adapters when they are hardly for one base.
    MissingDependencyError
        Without plotly: ``pip install 'lorastack[report]'``.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from lorastack import LoadedLora, LoraStack
    >>> b, a = np.ones((2, 1)), np.array([[3.0, 4.0, 0.0]])
    >>> one = LoadedLora.from_tensors({"w": (a, b)}, name="one")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = report(LoraStack([(one, 1.0)]), f"{folder}/report.html").read_text()
    >>> "7.07" in page, page.rstrip().endswith("</html>")
    (True, True)
    """
    from lorastack.report.outputs import Outputs, write

    path = Path(path)
    outputs = Outputs(path, None if markdown is None else Path(markdown), None if svg is None else Path(svg))
    how: dict[str, Any] = {"intruders": intruders, "allow_mixed_bases": allow_mixed_bases, "progress": progress}
    write(stack, outputs, base, force, **how)
    return path
