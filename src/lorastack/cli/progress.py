"""The progress bar of commands that read or write much; silent where nobody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lorastack.cli.console import is_quiet, plain


@contextlib.contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done since the last call."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with _bar(*columns) as bar:
        task = bar.add_task(plain(label), total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def step_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the steps done and the steps there are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(*columns) as bar:
        task = bar.add_task(plain(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=is_quiet() or not console.is_terminal)
