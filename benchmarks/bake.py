"""Baking two adapters into one, against a cold, synced copy of the same bytes.

Run: python benchmarks/bake.py [MIB]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from core import SHAPES
from safetensors.numpy import save_file
from timing import ratio

from lorastack import LoraStack, load


def write_adapter(folder: Path, mib: int, dtype: type, seed: int) -> Path:
    """A PEFT folder of about this size, of random numbers."""
    rng = np.random.default_rng(seed)
    layers = 8
    row = sum(n_in + n_out for n_out, n_in in SHAPES.values()) * layers * np.dtype(dtype).itemsize
    rank = max(1, mib * 2**20 // row)
    tensors = {}
    for layer in range(layers):
        for module, (n_out, n_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, n_in), np.float32).astype(dtype)
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((n_out, rank), np.float32).astype(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    text = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 16}}'
    (folder / "adapter_config.json").write_text(text)
    return folder


def forget(paths: list[Path]) -> None:
    """Drop the files from the page cache, so that reading them is cold."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(sources: list[Path], target: Path) -> None:
    """Read everything and write it into one file, synced."""
    with target.open("wb") as out:
        for source in sources:
            with source.open("rb") as file:
                while block := file.read(1 << 22):
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())


def timed(call: object, cold: list[Path]) -> float:
    forget(cold)
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def bench(mib: int, dtype: type, scratch: Path) -> None:
    name = np.dtype(dtype).name
    folders = [write_adapter(scratch / f"{name}{n}", mib, dtype, n) for n in range(2)]
    files = [folder / "adapter_model.safetensors" for folder in folders]
    command = [str(Path(sys.executable).with_name("lorastack")), "bake", f"{folders[0]}:0.7", f"{folders[1]}:0.3"]

    def library() -> None:
        LoraStack([(load(folders[0]), 0.7), (load(folders[1]), 0.3)]).bake().save(scratch / "out", force=True)

    def bare() -> None:
        LoraStack([(load(folders[0]), 0.7), (load(folders[1]), 0.3)]).bake().save(
            scratch / "out", force=True, recipe=False
        )

    contenders = {
        "synced copy": lambda: copy(files, scratch / "copy"),
        "bake, without hashes": bare,
        "bake": library,
        "lorastack bake": lambda: subprocess.run(
            [*command, "-f", "-o", str(scratch / "out")], check=True, capture_output=True
        ),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(7):
        for key, call in contenders.items():
            seconds[key].append(timed(call, files))
    print(f"bake 2 x {files[0].stat().st_size / 2**20:.0f} MiB of {name}")
    for key, values in seconds.items():
        print(
            f"  {key:22} {median(values) * 1e3:8.0f} ms   speed x {ratio(seconds['synced copy'], values)} of the copy"
        )


def peak_memory(folders: list[Path], target: Path) -> None:
    """How much a bake adds to the process's peak, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    LoraStack([(load(folders[0]), 0.7), (load(folders[1]), 0.3)]).bake().save(target, force=True)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  peak memory added: {(after - before) / 1024:.0f} MiB (mapped pages of the inputs included)")


if __name__ == "__main__":
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch_:
        for dtype_ in (np.float16, np.float32):
            bench(mib, dtype_, Path(scratch_))
        peak_memory([Path(scratch_) / "float160", Path(scratch_) / "float161"], Path(scratch_) / "last")
