"""How a command ends that does not end well: an error in one line, an exit code, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lorastack.cli.console import echo, say_error, say_warning
from lorastack.errors import LoraStackError, LoraStackWarning

#: The exit code of what is a mistake of ours, as in sysexits.h; whatever else is wrong exits with 1 or 2.
_MISTAKE = 70
#: Set, it shows where a mistake of ours was made.
_TRACEBACK = "LORASTACK_TRACEBACK"


def run_to_its_end(command: Callable[[], object]) -> None:
    """Run it; errors are printed plainly and exit with 1, mistakes of ours with 70, signals exit as they would."""
    warnings.simplefilter("once", LoraStackWarning)
    warnings.showwarning = _show_warning
    known = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    # nohup ignores SIGHUP: it stays so.
    taken = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        _with_all_its_output(command)
    except LoraStackError as error:
        say_error(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (words := _words(error)) is None:
            _say_mistake(error)
            sys.exit(_MISTAKE)
        say_error(words)
    else:
        return
    finally:
        for number in taken:  # whoever called this goes on with the handlers it had
            signal.signal(number, signal.SIG_DFL)
    sys.exit(1)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C counts at the end of this: torch ends the process where it is interrupted while it is imported."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C is not for others
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _with_all_its_output(command: Callable[[], object]) -> None:
    """Run it and hand all that it printed to the system: what Python keeps to its own end fails where nobody looks."""
    try:
        command()
    finally:
        try:
            if sys.stdout is not None:  # it was closed by who started us
                sys.stdout.flush()
        except OSError as error:
            # Python would try once more at its end, and say so in words of its own.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):  # who reads no further wants no more
                raise


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of ours, printed plainly; the place in our code is nothing to the reader."""
    if issubclass(category, LoraStackWarning):
        say_warning(str(message))
    else:
        echo(warnings.formatwarning(message, category, filename, lineno, line), end="", err=True)


def _end(number: int, frame: FrameType | None) -> None:
    # Outputs are context managers, which clean up on their way out; a second signal must not end that.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _say_mistake(error: Exception) -> None:
    if os.environ.get(_TRACEBACK):
        echo("".join(traceback.format_exception(error)), end="", err=True)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    say_error(
        f"this is a mistake in lorastack, not in what you gave it: {said[:500]}"
        + ("" if os.environ.get(_TRACEBACK) else f"; {_TRACEBACK}=1 in the environment shows where, for a report")
    )


def _words(error: Exception) -> str | None:
    """What the system or Python ran into, in a plain word; None for what is a mistake of ours."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or str(error) or type(error).__name__}"
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written: {error}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, RecursionError):
        return "something here is nested too deep"
    return None
