"""The progress bar of commands that read or write much; silent where nobody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorastack.cli.console import plain


@contextlib.contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done since the last call."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(plain(label), total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def step_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the steps done and the steps there are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(plain(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
