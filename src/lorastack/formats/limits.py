"""How much of a file is read before anything is done with it, so that no file costs far more than its size.

Measured on what there is: DeepSeek's experts one by one are 94,000 tensors with names of 80 letters, a header of 15 MB.
"""

from __future__ import annotations

#: Letters in the name of a tensor.
MAX_NAME = 1_000
#: Tensors in one file.
MAX_TENSORS = 1 << 18
#: Bytes of a configuration, or of an index of shards.
MAX_JSON = 1 << 25
#: Problems of one kind that are listed: more would take more room than the file.
MOST_LISTED = 100_000

#: A text this short cannot cost much, whatever is in it.
_SHORT = 1 << 19
_TIMES, _FREE = 10, 48 << 20


def parsed_size_problem(raw: bytes, size: int) -> str | None:
    """Why a JSON text is not parsed: its objects would take far more memory than the file's ``size`` allows.

    What a header or a configuration holds is long texts in few objects. ``{},`` takes three bytes here, 72 in memory.
    """
    if len(raw) <= _SHORT:
        return None
    count = raw.count
    needed = 200 * count(b"{") + 100 * count(b"[") + 30 * count(b'"') + 36 * count(b",")
    if needed <= _TIMES * size + _FREE:
        return None
    return f"it would take some {needed >> 20} MiB of memory to parse, in a file of {size} bytes; no real one does"
