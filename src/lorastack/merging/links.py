"""Hard links, for files of a new base that are the old one's to the byte."""

from __future__ import annotations

import os
from pathlib import Path


def linked_to(source: Path, target: Path) -> bool:
    """Whether a hard link could be made: not to another disk, nor where the file system has none."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        return False
    return True
