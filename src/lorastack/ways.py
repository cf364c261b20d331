"""Ways out of an error, in the words of who asks: functions and arguments in Python, flags on a command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

#: The flags of the command that runs, the innermost last; in Python there is none.
_COMMANDS: list[Collection[str]] = []


class Way(NamedTuple):
    """One way out as Python says it, and as the command says it; None where there is none."""

    python: str | None
    command: str | None


@contextlib.contextmanager
def command_line(flags: Collection[str]) -> Iterator[None]:
    """Inside, errors speak of ``flags``, those that the running command has, and of no Python name."""
    _COMMANDS.append(flags)
    try:
        yield
    finally:
        _COMMANDS.pop()


def ways(*choices: Way | str, lead: str = "; ") -> str:
    """The ways there are for who asks, behind ``lead``; empty where there is none.

    On a command line a way is left out whose flags the command does not have. A plain string is a way for both.

    >>> nan = "train it again", Way("load it with allow_nonfinite=True", "let it through with --allow-nonfinite")
    >>> ways(*nan)
    '; train it again, or load it with allow_nonfinite=True'
    >>> with command_line({"--base"}):
    ...     ways(*nan)
    '; train it again'
    """
    said = [choice if isinstance(choice, str) else _spoken(choice) for choice in choices]
    known = [one for one in said if one]
    return lead + ", or ".join(known) if known else ""


def argument(name: str) -> str:
    """A Python argument by its name, which a command that has it takes as a flag: ``rank`` and ``--rank``."""
    flag = f"--{name.replace('_', '-')}"
    return flag if _COMMANDS and flag in _COMMANDS[-1] else name


def ignoring(field: str, when: str) -> Way:
    """Leaving a field of adapter_config.json out of account."""
    return Way(f"pass ignore=[{field!r}] {when}", f"pass --ignore {field} {when}")


def _spoken(way: Way) -> str | None:
    if not _COMMANDS:
        return way.python
    if way.command and set(re.findall(r"--[a-z][a-z-]*", way.command)) <= set(_COMMANDS[-1]):
        return way.command
    return None


def rename(old: str, new: str) -> Way:
    """Another front for the names of an adapter's weights."""
    return Way(f"load it with rename={{{old!r}: {new!r}}}", f"give --rename {old}={new}")


#: Ways that several errors have in common.
CONVERT = Way("convert it with convert_names(lora, base)", "give --base to convert it")
LIVE = Way("attach the stack with lorastack.torch instead", "use the adapters at run time instead")
SELECT = Way("leave it out with select()", None)
BASE = Way("give it as base=...", "give it with --base")
NONFINITE = Way("load it with allow_nonfinite=True", "let it through with --allow-nonfinite")
FORCE = Way("pass force=True", "pass --force")
MIXED = (
    Way("give the base they are for as base=...", "give the base they are for with --base"),
    Way("let them be with allow_mixed_bases=True", "let them be with --allow-mixed-bases"),
)


def drop_extras(kind: str | None = None) -> Way:
    """Leaving out what is not low-rank, of this kind or any."""
    if kind == "lokr":
        return Way("cut it to a low rank with load(path, rank=...)", "cut it to a low rank with --lokr-rank")
    said = repr(kind) if kind else ""
    return Way(f"leave it out with without_extras({said})", "leave out all that is not low-rank with --drop-extras")
