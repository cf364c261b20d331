"""Merging into a synthetic bfloat16 checkpoint, against a cold, synced copy of it; and PEFT on a size it can hold.

Every tensor that is a matrix changes. Run: python benchmarks/merge.py [GIB [GIB_OF_THE_LARGEST [ROUNDS]]]
MERGEKIT names the Python of an environment that has mergekit, which is asked for the same then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, RANK = 4096, 14336, 16
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 4, WIDTH),
    "self_attn.v_proj": (WIDTH // 4, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
#: What a child process runs, and prints: seconds, its peak of memory, and for a merge the time that parts of it took.
OURS = """
import sys, time, json
from lorastack import load, merge
base, adapter, out, verify = sys.argv[1:]
marks = {}
def progress(what, done, total):
    marks.setdefault(what, time.perf_counter())
start = time.perf_counter()
merge(base, load(adapter), out, verify=verify == "1", progress=progress)
end = time.perf_counter()
"""
PEFTS = """
import sys, time, json, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out, _ = sys.argv[1:]
marks = {}
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
end = time.perf_counter()
"""
MERGEKITS = """
import sys, time, json
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
base, adapter, out, _ = sys.argv[1:]
marks = {}
start = time.perf_counter()
said = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], "dtype": "bfloat16"}
options = MergeOptions(copy_tokenizer=False, lora_merge_cache=out + "-cache")
run_merge(MergeConfiguration.model_validate(said), out, options)
end = time.perf_counter()
"""
TELL = """
import os
os.sync()
synced = time.perf_counter()
said = open("/proc/self/status").read()
peak = int(said.split("VmHWM:")[1].split()[0]) * 1024
order = sorted(marks, key=marks.get)
parts = {a: marks[b] - marks[a] for a, b in zip(order, order[1:])}
print(json.dumps({"seconds": synced - start, "peak": peak, "parts": parts}))
"""


def random_matrix(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Numbers of a trained weight's size; of a large one, the same lines again and again."""
    few = min(shape[0], 1024)
    lines = (rng.standard_normal((few, shape[1]), np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    return np.tile(lines, (-(-shape[0] // few), 1))[: shape[0]]


def write_base(folder: Path, gib: float, largest: float) -> dict[str, tuple[int, int]]:
    """A llama in shards of at most two layers, its embedding of ``largest`` GiB; returns its matrices."""
    rng = np.random.default_rng(0)
    vocabulary = int(largest * 2**30) // (2 * WIDTH)
    layer = sum(2 * n_out * n_in for n_out, n_in in SHAPES.values())
    layers = max(1, int((gib - largest) * 2**30) // layer)
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, WIDTH)}]
    for n in range(layers):
        names = {f"model.layers.{n}.{module}.weight": shape for module, shape in SHAPES.items()}
        norms = {
            f"model.layers.{n}.{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        shards.append({**names, **norms})
    shards[-1]["model.norm.weight"] = (WIDTH,)
    folder.mkdir()
    weight_map, matrices, total = {}, {}, 0
    for n, shard in enumerate(shards):
        file = f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        arrays = {}
        for name, shape in shard.items():
            arrays[name] = random_matrix(shape, rng) if len(shape) == 2 else np.ones(shape, ml_dtypes.bfloat16)
            weight_map[name] = file
            total += arrays[name].nbytes
            if len(shape) == 2:
                matrices[name] = shape
        save_file(arrays, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return matrices


def write_adapter(folder: Path, matrices: dict[str, tuple[int, int]], embedding: bool) -> Path:
    """A PEFT folder of rank 16 at every matrix, the embedding only where asked for."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, (n_out, n_in) in matrices.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith("embed_tokens.weight"):
            if embedding:
                tensors[f"{key}.lora_embedding_A"] = rng.standard_normal((RANK, n_out), np.float32)
                tensors[f"{key}.lora_embedding_B"] = 0.001 * rng.standard_normal((n_in, RANK)).astype(np.float32)
            continue
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, n_in), np.float32)
        tensors[f"{key}.lora_B.weight"] = 0.001 * rng.standard_normal((n_out, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-2] for name in matrices} - ({"embed_tokens"} if not embedding else set()))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def forget(folder: Path) -> None:
    """Nothing of a folder is in the system's memory afterwards."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(code: str, base: Path, adapter: Path, out: Path, verify: bool = False, python: str = sys.executable) -> dict:
    forget(base)
    words = [python, "-c", code + TELL, str(base), str(adapter), str(out), str(int(verify))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    shutil.rmtree(out)
    shutil.rmtree(f"{out}-cache", ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def copied(base: Path, out: Path) -> float:
    """Seconds of a copy that is on the disk."""
    forget(base)
    start = time.perf_counter()
    shutil.copytree(base, out)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def main() -> None:
    gib, largest, rounds = (float(word) for word in (sys.argv[1:] + ["8", "2", "3"][len(sys.argv) - 1 :])[:3])
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        work = Path(scratch)
        matrices = write_base(work / "base", gib, largest)
        adapter = write_adapter(work / "adapter", matrices, embedding=True)
        size = sum(path.stat().st_size for path in (work / "base").iterdir())
        print(
            f"{size / 2**30:.1f} GiB in {len(list((work / 'base').glob('*.safetensors')))} shards, all matrices change"
        )
        copies, merges = [], []
        for _ in range(int(rounds)):
            copies.append(copied(work / "base", work / "out"))
            merges.append(child(OURS, work / "base", adapter, work / "out"))
        ratios = sorted(copy / one["seconds"] for copy, one in zip(copies, merges, strict=True))
        print(f"  cold, synced copy {median(copies):.1f} s, merge {median(one['seconds'] for one in merges):.1f} s")
        print(f"  speed of the copy's: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"  VmHWM {max(one['peak'] for one in merges) / 2**20:.0f} MiB")
        parts = merges[-1]["parts"]
        print("  estimating", f"{parts.get('estimating', 0) / merges[-1]['seconds']:.1%} of the run")
        shutil.rmtree(work / "base")
        shutil.rmtree(adapter)
        matrices = write_base(work / "base", gib / 4, largest / 4)
        adapter = write_adapter(work / "adapter", matrices, embedding=False)
        ours = [child(OURS, work / "base", adapter, work / "out") for _ in range(int(rounds))]
        theirs = [child(PEFTS, work / "base", adapter, work / "out") for _ in range(int(rounds))]
        print(f"{gib / 4:.1f} GiB, all matrices but the embedding change")
        named = [("ours", ours), ("PEFT merge_and_unload + save_pretrained", theirs)]
        if mergekit := os.environ.get("MERGEKIT"):
            runs = [child(MERGEKITS, work / "base", adapter, work / "out", python=mergekit) for _ in range(int(rounds))]
            named.append(("mergekit passthrough, base+adapter", runs))
        for name, runs in named:
            peak = max(one["peak"] for one in runs) / 2**20
            print(f"  {name:42} {median(one['seconds'] for one in runs):6.1f} s, VmHWM {peak:.0f} MiB")


if __name__ == "__main__":
    main()
