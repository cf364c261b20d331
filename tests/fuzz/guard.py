"""Guard: what one input may do to the library, and what is a finding when it does more.

It knows nothing of formats: a target is a function of some bytes and an empty folder. An error of ours is an answer.
Anything else that is raised, a warning that is not ours, a message that a terminal would obey, five seconds of work
and memory far beyond the input are findings.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from lorastack.errors import LoraStackError, LoraStackWarning
from lorastack.formats import opened

Work = Callable[[bytes, Path], None]

#: Of the processor's time, as other programs may be at work. Patterns of ranks and of alphas may take two each.
SECONDS = 5.0
#: A constant for the libraries' own objects, and so many bytes for each byte of the input.
CONSTANT, FACTOR = 64 << 20, 10
#: What a message may have beside what it quotes.
MESSAGE = 4096
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_STATUS = Path("/proc/self/status")


class Finding(Exception):  # noqa: N818  no error of the program that meets it
    """An input did what none may do; ``where`` tells findings of one cause from others."""

    def __init__(self, said: str, where: str = "") -> None:
        super().__init__(said)
        self.where = where or said


class _TooLong(BaseException):
    """Raised by the clock; no handler of exceptions may keep it."""


def answer(work: Work, data: bytes, folder: Path) -> str:
    """What the library makes of ``data``: ``taken``, or the message of its refusal without what it quotes.

    Raises
    ------
    Finding
        When it does anything else.
    """
    _forget_peak()
    before = _memory("VmRSS")
    refusal = ""
    warned: list[tuple[type[Warning], str, str]] = []

    def note(message: Warning | str, category: type[Warning], *_: object) -> None:
        warned.append((category, str(message), _line(traceback.extract_stack())))

    with _clock(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # the stack tells more than the line that warns
        try:
            work(data, folder)
        except LoraStackError as error:
            refusal = str(error)
        except Finding:
            raise
        except _TooLong as error:
            raise Finding(f"it takes more than {SECONDS:g} s, in {_place(error)}", f"time in {_place(error)}") from None
        except AssertionError as error:
            raise Finding(f"it is wrong: {error}", f"wrong in {_place(error)}") from error
        except Exception as error:
            where = f"{type(error).__name__} in {_place(error)}"
            raise Finding(f"{where}: {str(error)[:500]}", where) from error
    used = _memory("VmHWM") - before
    if used > CONSTANT + FACTOR * len(data):
        raise Finding(f"it takes {used >> 20} MiB of memory for {len(data)} bytes", "memory")
    for category, message, line in warned:
        _check_text(message, len(data))
        if not issubclass(category, LoraStackWarning):
            where = f"{category.__name__} in {line}"
            raise Finding(f"a warning that is not ours: {where}: {message[:500]}", where)
    _check_text(refusal, len(data))
    return _shape(refusal) if refusal else "taken"


@contextlib.contextmanager
def workplace(within: Path | None = None) -> Iterator[Callable[[], Path]]:
    """Gives an empty folder at each call; all are removed at the end.

    Nobody else writes to these files, so the library does not wait until a change of them could be seen.
    """
    tick, opened.TICK = opened.TICK, 0.0
    where = Path(tempfile.mkdtemp(prefix="lorastack-fuzz-", dir=within or memory()))

    def empty() -> Path:
        folder = where / "x"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    try:
        yield empty
    finally:
        opened.TICK = tick
        shutil.rmtree(where, ignore_errors=True)


def memory() -> Path | None:
    """A place for files that are in memory only, where the system has one."""
    place = Path("/dev/shm")
    return place if os.access(place, os.W_OK) else None


def _check_text(text: str, size: int) -> None:
    odd = sorted({c for c in text if c in _BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")})
    if odd:
        raise Finding(f"a message holds {odd}: {text[:300]!r}", "control characters")
    if len(text) > MESSAGE + FACTOR * size:
        raise Finding(f"a message has {len(text)} letters for an input of {size} bytes", "long message")


def _shape(message: str) -> str:
    """A message without what it quotes: two inputs that are refused for one reason look alike."""
    text = re.sub(r"/\S+", "", message[:400])
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}", "_", text)
    return re.sub(r"[\d.]+\S*", "0", text).partition("\n  - ")[2] or text


def _place(error: BaseException) -> str:
    return _line(traceback.extract_tb(error.__traceback__))


def _line(frames: traceback.StackSummary) -> str:
    """The line of ours, or of a target, that was at work."""
    ours = [f for f in frames if "/lorastack/" in f.filename or "/fuzz/" in f.filename]
    last = [f for f in ours if not f.filename.endswith("guard.py")][-1:] or frames[-1:]
    return f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "?"


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    """Raise `_TooLong` in what runs too long."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _forget_peak() -> None:
    """Let the system measure the peak of this process' memory from now on, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str) -> int:
    """Bytes of memory now, or at the peak; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    found = re.search(rf"{what}:\s+(\d+)", _STATUS.read_text())
    return int(found[1]) << 10 if found else 0
