"""Which writer a place and a format ask for, and whether it makes a file or a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError
from lorastack.formats.diffusers_save import save_diffusers
from lorastack.formats.gguf_save import save_gguf
from lorastack.formats.kohya import FORMAT_KEY
from lorastack.formats.kohya_save import save_kohya
from lorastack.formats.mlx_save import save_mlx
from lorastack.formats.peft_save import save_peft
from lorastack.ways import Way, ways

#: What an adapter can be written as.
Format = Literal["gguf", "peft", "kohya", "comfyui", "diffusers", "mlx"]
#: What diffusers calls the file of an adapter's folder.
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

#: Writes an adapter to a file, or into a folder: adapter, place, dtype, recipe, progress.
Writer = Callable[[LoadedLora, Path, str | None, str | None, Callable[[int], None] | None], None]
_SINGLE: dict[str, Writer] = {
    "kohya": save_kohya,
    "comfyui": partial(save_kohya, comfyui=True),
    "diffusers": save_diffusers,
}
_FOLDERS: dict[str, Writer] = {"peft": save_peft, "mlx": save_mlx}


def writer_of(lora: LoadedLora, path: Path, format: Format | None) -> tuple[bool, Writer]:
    """(whether it makes a file, the writer) for this place.

    Raises
    ------
    ArgumentError
        When there is no such format, or it has another ending.
    """
    ending = path.suffix
    if format is None:
        if ending == ".gguf":
            return True, save_gguf
        if ending not in (".safetensors", ".bin"):
            return False, save_peft
        came_from = str(lora.metadata.get(FORMAT_KEY, "")).lower()
        if ending == ".bin" or came_from not in _SINGLE:
            said = Way("say which with format='kohya', 'comfyui' or 'diffusers'", "say which with --format")
            raise ArgumentError(
                f"{path}: an adapter is written as NAME.gguf, or as a PEFT folder: leave the ending out"
                + (ways(said) if ending == ".safetensors" else "")
            )
        return True, _SINGLE[came_from]
    if format not in get_args(Format):
        raise ArgumentError(f"there is no format {format!r}; there are {', '.join(get_args(Format))}")
    wanted = ".gguf" if format == "gguf" else ".safetensors" if format in _SINGLE else ""
    if ending != wanted and ((wanted and format != "diffusers") or ending in (".gguf", ".safetensors", ".bin")):
        raise ArgumentError(f"{path}: format {format!r} is written as {f'NAME{wanted}' if wanted else 'a folder'}")
    if format == "gguf":
        return True, save_gguf
    if format == "diffusers" and ending != wanted:
        return False, _in_folder
    return format in _SINGLE, _SINGLE[format] if format in _SINGLE else _FOLDERS[format]


def refuse_figures(path: Path) -> None:
    """Refuse a place for which no figures can be drawn: a file has no card to show them."""
    if path.suffix in (".gguf", ".safetensors"):
        raise ArgumentError(
            f"{path}: figures are those of a folder's card, and this is a file"
            + ways("write a folder", Way("leave figures out", "leave --figures out"))
        )


def library_of(write: Writer) -> str | None:
    """The library that reads the folder it writes, as the hub calls it; None of one that writes a file."""
    libraries: dict[Writer, str] = {save_peft: "peft", save_mlx: "mlx", _in_folder: "diffusers"}
    return libraries.get(write)


def _in_folder(lora: LoadedLora, folder: Path, *how: Any) -> None:
    save_diffusers(lora, folder / DIFFUSERS_WEIGHTS, *how)
