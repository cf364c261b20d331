"""Files beside an adapter's own that hold more of what was trained, and are not read."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

from lorastack.errors import FormatError
from lorastack.formats.safetensors_file import SafetensorsFile

#: What programs call such files: LLaVA, LongLoRA, vLLM's format for added tokens, TRL; one of a hub repository is
#: fetched too, since what is not there cannot be said to be left out.
KNOWN = (
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "trainable_params.bin",
    "new_embeddings.safetensors",
    "new_embeddings.bin",
    "value_head.safetensors",
    "value_head.bin",
)
#: And what others are likely to be called.
_LIKELY = re.compile("trainable|projector|embed|head|resampler|connector|qformer|classifier|score", re.IGNORECASE)
_ENDINGS = (".bin", ".safetensors", ".pt", ".pth")
_MAX_PICKLE = 1 << 21


def companions(folder: Path, own: Collection[Path]) -> dict[str, str]:
    """Name -> what to say of it, for every such file in the folder that is not one of the adapter's ``own``."""
    likely = [name for name in os.listdir(folder) if name.endswith(_ENDINGS) and _LIKELY.search(name)]
    if not likely:
        return {}
    ours = {path.name for path in own}
    found = [folder / name for name in sorted(likely) if name not in ours]
    return {path.name: f"{path.name} holds {_held(path)}, which is not read" for path in found if path.is_file()}


def _held(path: Path) -> str:
    count = _tensors_in(path)
    if count is None:
        return f"further trained weights ({path.stat().st_size} bytes)"
    return f"{count} further trained tensor{'' if count == 1 else 's'}"


def _tensors_in(path: Path) -> int | None:
    """How many tensors a file holds, as its header or its pickle's opcodes say; nothing in it is run."""
    try:
        if path.suffix == ".safetensors":
            return len(SafetensorsFile(path).tensors)
        with zipfile.ZipFile(path) as parts:
            (pickled,) = (part for part in parts.infolist() if part.filename.endswith("/data.pkl"))
            if pickled.file_size > _MAX_PICKLE:
                return None
            # Each tensor names its storage once, by a persistent id.
            return sum(opcode.name == "BINPERSID" for opcode, _, _ in pickletools.genops(parts.read(pickled)))
    except (FormatError, OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, IndexError):
        return None
