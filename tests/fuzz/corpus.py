"""The corpus: every input that ever got through, kept as a small file by target, or made where it is too large."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from tests.fixtures.make_hostile import HERE as HOSTILE
from tests.fuzz.oversize import MADE
from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent / "corpus"
#: Which of the small hostile files that other tests load too are inputs of which target.
_SHARED = {"gguf": "*.gguf", "safetensors": "*/adapter_model.safetensors", "pickled": "*/adapter_model.bin"}


def every(target: str) -> dict[str, Callable[[], bytes]]:
    """Every input of a target by name: its seeds, its files, those shared with other tests and those that are made."""
    found: dict[str, Callable[[], bytes]] = {}
    for n, seed in enumerate(TARGETS[target].seeds()):
        found[f"seed-{n}"] = lambda seed=seed: seed
    if target in _SHARED:
        found |= {str(path.relative_to(HOSTILE)): path.read_bytes for path in sorted(HOSTILE.glob(_SHARED[target]))}
    found |= {path.name: path.read_bytes for path in files(target)}
    return found | {name: make for (of, name), make in MADE.items() if of == target}


def files(target: str) -> list[Path]:
    """The files of a target's own."""
    folder = HERE / target
    return sorted(folder.iterdir()) if folder.is_dir() else []


def name_of(data: bytes) -> str:
    """What a file with this input is called, unless somebody gives it a better name."""
    return hashlib.sha256(data).hexdigest()[:12]
