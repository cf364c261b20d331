"""Adapter files: `load` looks at the content and hands over to the reader of that format, `save` at the ending."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lorastack.core.adapter import LoadedLora
from lorastack.errors import ArgumentError, FormatError, shown
from lorastack.files import below, whole_output
from lorastack.formats import companions, diffusers, gguf, kohya, mlx, peft
from lorastack.formats.card import SOMEWHERE, Figure, adapter_card, write_card
from lorastack.formats.gguf_save import save_gguf
from lorastack.formats.heads import is_gguf, is_safetensors, read_head
from lorastack.formats.opened import OpenedFile
from lorastack.formats.others import WITHOUT, reader_of
from lorastack.formats.peft_config import CONFIG_NAME, read_config
from lorastack.formats.peft_files import stands_for_folder
from lorastack.formats.products import cut_products
from lorastack.formats.provenance import Provenance, sources_of
from lorastack.formats.safetensors_file import SafetensorsFile
from lorastack.formats.shards import refuse_part
from lorastack.formats.writers import DIFFUSERS_WEIGHTS, Format, library_of, refuse_figures, writer_of
from lorastack.hub import ADAPTER_FILES, resolve
from lorastack.ways import drop_extras, ways

#: How far below a folder adapters are looked for, to name them.
MAX_DEPTH = 4
#: Elements of an array in the head of a model, whose vocabulary has one for each token.
MAX_VOCABULARY = 1 << 22


class _How(NamedTuple):
    """The options that readers have in common."""

    allow_nonfinite: bool
    ignore: Collection[str]


def load(
    path: str | Path,
    *,
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    subfolder: str | None = None,
    rename: Mapping[str, str] | None = None,
    rank: int | None = None,
) -> LoadedLora:
    """Load an adapter of any format: a file, a folder, or a hub id. The content decides, not the ending.

    Opening checks the header; factors are read into memory when first used, from the same open of the file: one that
    was changed meanwhile is an error.

    Parameters
    ----------
    path
        A file, a folder, or ``owner/name``, ``owner/name/subfolder``, ``owner/name@revision`` on the
        Hugging Face hub (from the cache when offline).
    name
        The adapter's name; its file's stem or folder's name when not given.
    allow_nonfinite
        Let NaN and Inf in factors through.
    ignore
        Fields of adapter_config.json, and files beside the adapter with more of what was trained, to leave out of
        account.
    subfolder
        The folder inside the repository or folder that holds the adapter.
    rename
        Another front for weights' names, by whole parts: ``{"model": "model.language_model"}`` lets a text adapter fit
        the text part of a model with pictures. See `LoadedLora.with_weights_renamed`.
    rank
        The rank that LoKr updates of two full factors are cut to, which no low rank holds; the notes say their errors.

    Raises
    ------
    FormatError
        Listing everything that is wrong with the file.
    """
    given = os.fspath(path)
    where = resolve(given, subfolder, (*ADAPTER_FILES, *companions.KNOWN))
    if name is None and where.parts[-2:-1] == ("snapshots",):
        # The cache names a snapshot's folder by its hash, and that above it models--OWNER--NAME.
        name = where.parts[-3].rpartition("--")[2]
    load_it = _load_folder if where.is_dir() else _load_file
    lora = load_it(where, name, _How(allow_nonfinite, ignore))
    lora = lora.with_weights_renamed(rename) if rename else lora
    return lora if rank is None else cut_products(lora, rank)


def save(
    lora: LoadedLora,
    path: str | Path,
    *,
    format: Format | None = None,
    dtype: str | None = None,
    force: bool = False,
    recipe: bool = True,
    architecture: str | None = None,
    figures: bool = False,
    place: str = SOMEWHERE,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write an adapter, as the ending says: ``.gguf`` as llama.cpp reads it, any other name as a PEFT folder.

    The output is written beside its place and moved there whole. A folder gets a README.md too, the adapter's card, in
    which no path of this machine is; nor is one written as the name of the base.

    Parameters
    ----------
    format
        ``"kohya"`` or ``"comfyui"`` (a ``.safetensors`` file), ``"diffusers"`` (one, or a folder), ``"mlx"``,
        ``"peft"`` (folders) or ``"gguf"``. When not given, the ending says it; a ``.safetensors`` file gets the format
        that the adapter came from.
    dtype
        ``"f32"``, ``"f16"``, ``"bf16"`` or (GGUF) ``"q8_0"``; each factor keeps its own when not given.
    force
        Replace an output that exists: a file, or a folder that holds an adapter and nothing else (a README.md and
        figures that were not changed since they were written here); never one that ``lora`` was made of.
    recipe
        Keep in the file's metadata what the adapter was made of: sources, their sha256, scales.
    architecture
        GGUF: the base's architecture, such as ``"llama"``, of an adapter that does not say it (one made in memory).
    figures
        Draw for a folder's card, into ``figures`` in it: the norm at each layer, the singular values, and how alike the
        adapters are that it was made of. Needs plotly, and a decomposition of every update.
    place
        Where the card says that the folder is loaded from, such as the repository that it goes to.
    progress
        Called with the bytes of every tensor written.

    Raises
    ------
    FormatError
        Listing everything that the format cannot hold; nothing is written then.
    ArgumentError
        When the output exists and ``force`` is not set, or it is nothing to replace; for figures of a file.
    MissingDependencyError
        For figures without plotly: ``pip install 'lorastack[report]'``.
    """
    path = Path(path)
    as_file, write = writer_of(lora, path, format)
    if figures:
        refuse_figures(path)
    if architecture is not None:
        as_gguf = write is save_gguf
        said = lora.metadata.get("general.architecture")
        if not as_gguf or said not in (None, architecture):
            raise ArgumentError(
                f"{path}: architecture={architecture!r} is for GGUF adapters that do not say theirs; "
                + (f"{lora.name} says {said!r}" if as_gguf else "a PEFT folder has no such field")
            )
        lora = replace(lora, metadata=MappingProxyType({**lora.metadata, "general.architecture": architecture}))
    _check_tokens(lora)
    with whole_output(path, force, folder=not as_file, sources=sources_of(lora)) as scratch:
        drawn = _drawn(lora) if figures else []  # which says what is missing before the work
        write(lora, scratch, dtype, Provenance.of_lora(lora).to_toml() if recipe else None, progress)
        if library := library_of(write):
            write_card(scratch, adapter_card(lora, library, recipe, place, drawn), drawn)
    return path


def _drawn(lora: LoadedLora) -> list[Figure]:
    from lorastack.report.card import figures_of

    return figures_of(lora)


def _check_tokens(lora: LoadedLora) -> None:
    """An activated LoRA acts after tokens, which are numbers of a vocabulary."""
    tokens = lora.extras.get("alora", {}).get("invocation_tokens", ())
    if not isinstance(tokens, (tuple, list)) or not all(type(token) is int and 0 <= token < 2**32 for token in tokens):
        raise FormatError(
            f"{lora.name} cannot be written: its invocation tokens are {shown(tokens)}, expected numbers of tokens"
            + ways(drop_extras("alora"))
        )


def adapters_in(folder: Path) -> list[Path]:
    """The adapters in a folder that is none itself: PEFT folders below it, and GGUF files in it that are no model.

    Empty where the folder is an adapter, a whole model, or no folder.
    """
    if not os.path.isdir(folder) or (folder / CONFIG_NAME).is_file() or _is_model(folder):
        return []
    return _adapters_below(folder) + [path for path in _weight_files(folder) if path.suffix == ".gguf" and _adds(path)]


def _adds(path: Path) -> bool:
    """Whether a GGUF file is an adapter, and not a model."""
    try:
        kind = gguf.open_reader(path, MAX_VOCABULARY).fields.get("general.type")
    except FormatError:  # damaged: whoever loads it says how
        return True
    return kind is not None and kind.contents() != "model"


def _adapters_below(folder: Path) -> list[Path]:
    return sorted(path.parent for path in below(folder, MAX_DEPTH) if path.name == CONFIG_NAME)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in below(folder, 1) if path.suffix in (".gguf", ".safetensors"))


def _lone_file(folder: Path) -> Path | None:
    """The adapter's only file, in a folder that is no whole model."""
    files = _weight_files(folder)
    if (folder / "config.json").exists():
        return None
    usual = folder / DIFFUSERS_WEIGHTS
    return usual if usual in files else files[0] if len(files) == 1 else None


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and bool(_weight_files(folder) or list(folder.glob("pytorch_model*.bin")))


def _load_folder(folder: Path, name: str | None, how: _How) -> LoadedLora:
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        return _load_configured(folder, name, how)
    if file := _lone_file(folder):
        return _load_file(file, name, how)
    inside = adapters_in(folder)
    if len(inside) == 1:
        return (_load_folder if inside[0].is_dir() else _load_file)(inside[0], name, how)
    if inside:
        raise FormatError(f"{folder}: it holds several adapters; load one of them", [str(one) for one in inside[:50]])
    if below_it := _adapters_below(folder):
        said = f"{folder}: it holds a whole model, and an adapter below it; load one of them"
        raise FormatError(said, [str(path) for path in below_it[:50]])
    if (folder / "config.json").exists():
        raise FormatError(f"{folder}: it is a whole model (config.json, no {CONFIG_NAME}); give it as the base")
    files = _weight_files(folder)
    listing = [str(p) for p in files] or ["no .gguf or .safetensors file there either"]
    raise FormatError(f"{folder}: it has no {CONFIG_NAME}; name one file, or a folder saved by PEFT", listing)


def _load_file(path: Path, name: str | None, how: _How) -> LoadedLora:
    file = OpenedFile(path)
    head = read_head(file)
    if is_gguf(head):
        return gguf.load(file, name, how.allow_nonfinite)
    refuse_part(path)
    folder = path.parent
    configured = (folder / CONFIG_NAME).is_file()
    if configured and stands_for_folder(path):
        return _load_folder(folder, name, how)
    if is_safetensors(head) or not configured:
        weights = SafetensorsFile(file)
        reader = reader_of(weights.tensors, weights.metadata)
        if reader == "kohya":
            return kohya.load(weights, name, how.allow_nonfinite)
        if reader == "diffusers":
            return diffusers.load(weights, name, how.allow_nonfinite, how.ignore)
        if not configured or reader not in ("peft", "mlx"):
            raise FormatError(f"{path}: it is {WITHOUT.get(reader, reader)}")
    return _load_configured(folder, name or path.stem, how, weights=file)


def _load_configured(folder: Path, name: str | None, how: _How, weights: OpenedFile | None = None) -> LoadedLora:
    """An adapter with an adapter_config.json, which MLX has under the same name as PEFT."""
    file = OpenedFile(folder / CONFIG_NAME)
    raw = read_config(file)
    reader = mlx.load if mlx.is_mlx(raw) else peft.load
    return reader(file, raw, name, how.allow_nonfinite, how.ignore, weights)
