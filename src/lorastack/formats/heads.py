"""What a file is by its first bytes, where it is not what its reader expects: the word for every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lorastack.errors import FormatError, shown
from lorastack.formats.opened import OpenedFile

#: What a reader takes.
Wanted = Literal["safetensors", "GGUF", "torch", "JSON"]

#: Enough for a name inside an archive, and for tar's mark at byte 257.
_HEAD = 512
_FETCH = "fetch the file itself again"
_POINTER = "not the file itself; run: git lfs pull"
_OLD_GGML = (
    "of llama.cpp before GGUF, which is not read; convert the PEFT adapter it was made of with convert_lora_to_gguf.py"
)
#: First bytes -> what such a file is, and the way out. llama.cpp wrote its magics as numbers: backwards in the file.
_FOREIGN: dict[tuple[bytes, ...], str] = {
    (b"version https://git-lfs", b"version https://hawser"): f"a Git LFS pointer, {_POINTER}",
    (b"# xet version",): "a Xet pointer, not the file itself; run: git xet checkout, or fetch it from the hub again",
    (b"/annex/objects/", b"../.git/annex/"): "a git-annex pointer, not the file itself; run: git annex get",
    (b"algg", b"ggla"): f"an adapter (ggla) {_OLD_GGML}",
    (b"lmgg", b"ggml", b"fmgg", b"ggmf", b"tjgg", b"ggjt", b"nsgg", b"ggsn"): f"a file {_OLD_GGML}",
    (b"\x89HDF\r\n\x1a\n",): "an HDF5 file, as Keras saves; save the adapter with PEFT",
    (b"\x93NUMPY",): "a NumPy array (.npy); save the adapter with PEFT",
    (b"\x1f\x8b",): "packed with gzip; unpack it first",
    (b"BZh",): "packed with bzip2; unpack it first",
    (b"\xfd7zXZ\x00",): "packed with xz; unpack it first",
    (b"\x28\xb5\x2f\xfd",): "packed with zstd; unpack it first",
    (b"7z\xbc\xaf\x27\x1c",): "a 7z archive; unpack it first",
    (b"Rar!\x1a\x07",): "a RAR archive; unpack it first",
}
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


def read_head(file: Path | OpenedFile) -> bytes:
    """The first bytes of a file."""
    file = OpenedFile.of(file)
    return file.read(0, min(_HEAD, file.size))


def is_gguf(head: bytes) -> bool:
    return head.startswith(b"GGUF")


def is_pickled(head: bytes) -> bool:
    """Whether these are the first bytes of what torch.save writes: a zip archive, or a pickle."""
    pickled = head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    # The length that a safetensors file begins with may have the same bytes.
    return (pickled and not is_safetensors(head)) or (head.startswith(b"PK\x03\x04") and not _is_npz(head))


def is_safetensors(head: bytes) -> bool:
    """Whether these may be the first bytes of a safetensors file: a length below 2**32, then a JSON object."""
    return head[4:9] == b"\0\0\0\0{"


def foreign(head: bytes) -> str | None:
    """What a file with these first bytes is, and the way out; None where any reader here may take it."""
    if not head:
        return f"empty; {_FETCH}"
    for magics, said in _FOREIGN.items():
        if head.startswith(magics):
            return said
    if _is_npz(head):
        return "a NumPy archive (.npz); save the adapter with PEFT"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return f"a web page saved in place of the file; {_FETCH}"
    return None


def unreadable(file: OpenedFile, wanted: Wanted, otherwise: str) -> FormatError:
    """The error for a file that its reader cannot make sense of: what it is in truth, or else ``otherwise``."""
    return FormatError(f"{file}: it is {_said(read_head(file), wanted) or otherwise}")


def refuse_foreign(file: OpenedFile, wanted: Wanted) -> None:
    """Raise when the file is something else by its first bytes, for readers that would not notice by themselves."""
    if said := _said(read_head(file), wanted):
        raise FormatError(f"{file}: it is {said}")


def _said(head: bytes, wanted: Wanted) -> str | None:
    if said := foreign(head):
        return said
    if is_gguf(head) and wanted != "GGUF":
        return "a GGUF file; give it by itself, with the ending .gguf"
    if is_pickled(head) and wanted != "torch":
        return (
            "a pickle or a zip archive, as torch.save writes; such weights are read as adapter_model.bin "
            "beside their adapter_config.json"
        )
    if is_safetensors(head) and wanted in ("GGUF", "torch"):
        return "a safetensors file by its content; give it the ending .safetensors"
    if wanted != "JSON" and len(head) > 8 and _is_text(head):
        begins = shown(head.decode(errors="replace").strip().splitlines()[0])
        return f"a text that begins {begins}, no {wanted} file; {_FETCH}"
    return None


def _is_npz(head: bytes) -> bool:
    """A zip archive whose first part is an array."""
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(b".npy")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last letter is cut in two
            return False
        text = head[: error.start].decode()
    return bool(text.strip()) and all(letter.isprintable() or letter in "\t\r\n" for letter in text)
