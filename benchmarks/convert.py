"""Opening a large kohya file against a bare read of its header, and converting it against a cold, synced copy.

Run: python benchmarks/convert.py [MIB [ROUNDS]]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import save_file
from timing import interleave, show

from lorastack import convert, load

#: SDXL's attention: modules by width and how many there are.
BLOCKS = [(640, 10), (1280, 60)]
PARTS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0")


def write(path: Path, mib: int) -> None:
    """A file of kohya's in float16, of a rank that makes it so large."""
    rng = np.random.default_rng(0)
    widths = [width for width, count in BLOCKS for _ in range(count)]
    rank = max(1, (mib << 20) // (2 * sum(2 * width * len(PARTS) for width in widths)))
    tensors = {}
    for n, width in enumerate(widths):
        for part in PARTS:
            stem = f"lora_unet_down_blocks_{1 + n // 40}_attentions_{n // 20 % 2}_transformer_blocks_{n % 20}_{part}"
            tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((rank, width), np.float32).astype(np.float16)
            tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((width, rank), np.float32).astype(np.float16)
            tensors[f"{stem}.alpha"] = np.array(rank / 2, np.float16)
    save_file(tensors, path)


def forget(path: Path) -> None:
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(path: Path, out: Path) -> float:
    forget(path)
    start = time.perf_counter()
    shutil.copyfile(path, out)
    os.sync()
    return time.perf_counter() - start


def converted(path: Path, out: Path, to: str) -> float:
    forget(path)
    start = time.perf_counter()
    convert(path, out, to=to, force=True)  # type: ignore[arg-type]
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    mib, rounds = (int(word) for word in (sys.argv[1:] + ["200", "7"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        path = Path(scratch) / "large.safetensors"
        write(path, mib)

        def bare_json() -> object:
            with path.open("rb") as file:
                return json.loads(file.read(int.from_bytes(file.read(8), "little")))

        title = (
            f"open a kohya file of {path.stat().st_size >> 20} MiB, {sum(c for _, c in BLOCKS) * len(PARTS)} modules"
        )
        contenders = {"bare header read (json)": bare_json, "lorastack.load": lambda: load(path)}
        show(title, interleave(contenders), "bare header read (json)")
        for to in ("diffusers", "kohya"):
            pairs = [
                (copied(path, Path(scratch) / "copy"), converted(path, Path(scratch) / "new.safetensors", to))
                for _ in range(rounds)
            ]
            ratios = sorted(copy / ours for copy, ours in pairs)
            ours, copy = median(ours for _, ours in pairs), median(copy for copy, _ in pairs)
            print(f"to {to}: {ours:.2f} s, a cold, synced copy {copy:.2f} s")
            print(f"  of its speed: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
