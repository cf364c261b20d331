"""Texts that we write and know again: the last line has the hash of all above it.

People keep words of their own where we write ours: a README.md, a picture that was edited. Such a one is theirs, and is
not replaced.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lorastack.errors import LoraStackError
from lorastack.files.regular import read_regular

#: The card of a folder, as the hub calls it.
CARD = "README.md"
#: The folder in it that has the card's pictures.
FIGURES = "figures"
#: Names of files that may be signed.
_NAMES = re.compile(r"README\.md|[\w-]+\.svg", re.ASCII)
#: A comment, in Markdown and in SVG.
_LINE = "<!-- Written by LoraStack, sha256 of what is above: {} -->\n"
#: A picture of a model of many layers has less.
_MOST = 1 << 23


def signed(text: str) -> bytes:
    """The text with its last line, as it is written to a file."""
    content = text.encode()
    return content + _line(content)


def is_signed(path: Path) -> bool:
    """Whether a file is what we wrote, and nobody changed it since; not where it cannot be read."""
    if not _NAMES.fullmatch(path.name):
        return False
    try:
        content = read_regular(path, _MOST)
    except LoraStackError:
        return False
    size = len(_line(b""))
    return content[-size:] == _line(content[:-size])


def _line(content: bytes) -> bytes:
    return _LINE.format(hashlib.sha256(content).hexdigest()).encode()
