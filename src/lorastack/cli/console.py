"""What the commands print: texts out of files and names lose their control characters here, and only here."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from lorastack.errors import printable


class _Said:
    quiet = False


def be_quiet(quiet: bool) -> bool:
    """Whether what was done, and how far it is, goes unsaid; errors, warnings and results never do."""
    _Said.quiet = quiet
    return quiet


def is_quiet() -> bool:
    """Whether only what was asked for is said."""
    return _Said.quiet


def remark(text: object) -> None:
    """Print a line on what was done."""
    if not _Said.quiet:
        echo(text)


def plain(text: object) -> str:
    """A text as a cell or a line of rich shows it: no markup, no control characters."""
    from rich.markup import escape

    return escape(printable(str(text)))


def echo(text: object, end: str = "\n", err: bool = False, prose: bool = False) -> None:
    """Print a line as it is, control characters shown; ``prose`` is what a model wrote."""
    typer.echo(printable(f"{text}{end}", prose=prose), nl=False, err=err)


def echo_json(value: Any) -> None:
    """Print JSON; what a terminal would obey is escaped as JSON does."""
    import orjson

    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    except TypeError:  # a path that is no UTF-8, a number beyond 64 bits
        text = json.dumps(value, indent=2, default=str)
    typer.echo(printable(text, lambda code: f"\\u{code:04x}" if code < 0x10000 else json.dumps(chr(code))[1:-1]))


def say_error(text: str) -> None:
    """Print an error of ours."""
    _say("[bold red]error:[/]", text)


def say_warning(text: str) -> None:
    """Print a warning of ours."""
    _say("[bold yellow]warning:[/]", text)


def _say(label: str, text: str) -> None:
    from rich.console import Console  # here, since help and completion go without it

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{label} {plain(text)}")


class _Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if not _Said.quiet:
            echo(record.getMessage(), err=True)


@contextmanager
def saying(log: logging.Logger) -> Iterator[None]:
    """Inside, what is said in this log goes to the terminal's other stream."""
    handler, level = _Saying(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
