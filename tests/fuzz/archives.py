"""Archives as torch.save writes them, with one part changed: opcodes, names, sizes; the checksums are right."""

from __future__ import annotations

import io
import random
import warnings
import zipfile

#: Opcodes, and values that some of them take.
_OPCODES = (
    b".", b"}", b"]", b")", b"(", b"N", b"K\x01", b"\x8a\x01\x05", b"\x85", b"\x86", b"R", b"b", b"u", b"s", b"e",
    b"h\x00", b"q\x00", b"Q", b"0", b"\x93", b"\x81", b"\x94", b"X\x01\x00\x00\x00a", b"cbuiltins\nbytearray\n",
    b"cbuiltins\nset\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"ctorch\nfloat16\n", b"cos\nsystem\n", b"J\xff\xff\xff\xff",
    b"G" + bytes(8),
    b"I99999999999999\n", b"\x8b\x00\x00\x00\x40", b"B\xff\xff\xff\x7f",
)  # fmt: skip


def changed(data: bytes, rng: random.Random) -> bytes | None:
    """The archive with one part changed; None where it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            held = [(one.filename, parts.read(one)) for one in parts.infolist() if one.file_size < 1 << 20]
    except Exception:  # a damaged archive may raise whatever its fields lead to
        return None
    if not held:
        return None
    pickles = [n for n, (name, _) in enumerate(held) if name.endswith("data.pkl")]
    at = rng.choice(pickles) if pickles and rng.random() < 0.8 else rng.randrange(len(held))
    name, content = held[at]
    which = rng.randrange(8)
    if which < 5:
        held[at] = name, _pickle(content, rng)
    elif which == 5:
        held[at] = rng.choice((name + "x", "a/../" + name, "x/data.pkl", held[0][0], "/" + name)), content
    elif which == 6:
        held.append((name, content))
    else:
        del held[at]
    stream = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(stream, "w", packing) as parts,
    ):  # of names given twice
        for name, content in held:
            try:
                parts.writestr(zipfile.ZipInfo(name or "x"), content, packing)
            except (ValueError, UnicodeError):
                return None
    return stream.getvalue()


def _pickle(content: bytes, rng: random.Random) -> bytes:
    """One place of a pickle changed."""
    at = rng.randrange(len(content) + 1)
    which = rng.randrange(5)
    if which == 0:
        return content[:at] + content[at + rng.choice((1, 2, 5)) :]
    if which == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if which == 2:
        where = content.rfind(b"K", 0, at)  # a whole number: a size, a stride, an offset
        return (
            content[:where] + bytes([75, rng.choice((0, 1, 2, 9, 255))]) + content[where + 2 :]
            if where >= 0
            else content
        )
    piece = rng.choice(_OPCODES)
    return content[:at] + piece * rng.choice((1, 1, 1, 300)) + content[at + rng.choice((0, len(piece))) :]
