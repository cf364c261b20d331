"""Extracting an adapter from a synthetic bfloat16 fine-tune, against mergekit-extract-lora and the full SVD.

mergekit is asked for by its command, which may lie in an environment of its own: in PATH, or named by MERGEKIT. Every
process has one BLAS thread. Run: python benchmarks/extract.py [WIDTH [LAYERS [RANK [ROUNDS]]]]
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
from safetensors.numpy import load_file, save_file

OURS = "import sys\nfrom lorastack import extract, save\n" + (
    "save(extract(sys.argv[1], sys.argv[2], int(sys.argv[4]), exact=sys.argv[5] == '1'), sys.argv[3])"
)
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_pair(folder: Path, width: int, layers: int) -> tuple[Path, Path, dict[str, tuple[int, int]]]:
    """A llama and a fine-tune of it, whose differences decay slowly: singular values like 1 / n**0.5."""
    rng = np.random.default_rng(0)
    inner = width * 11 // 4 // 64 * 64
    sides = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in sides.items()}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    base: dict[str, np.ndarray] = {"model.embed_tokens.weight": rng.standard_normal((256, width), np.float32) * 0.02}
    base |= {
        "model.norm.weight": np.ones(width, np.float32),
        "lm_head.weight": base["model.embed_tokens.weight"].copy(),
    }
    changed: dict[str, tuple[int, int]] = {}
    for n in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{n}.{norm}.weight"] = np.ones(width, np.float32)
        for name, shape in shapes.items():
            changed[f"model.layers.{n}.{name}.weight"] = shape
    tuned = dict(base)
    for name, (n_out, n_in) in changed.items():
        base[name] = rng.standard_normal((n_out, n_in), np.float32) * 0.02
        few = 256
        decay = np.arange(1, few + 1, dtype=np.float32) ** -0.5
        low = (rng.standard_normal((n_out, few), np.float32) * decay) @ rng.standard_normal((few, n_in), np.float32)
        tuned[name] = base[name] + low * np.float32(0.002)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": 256,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for which, tensors in (("base", base), ("tuned", tuned)):
        (folder / which).mkdir()
        narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
        save_file(narrow, folder / which / "model.safetensors", {"format": "pt"})
        (folder / which / "config.json").write_text(json.dumps(config))
    return folder / "tuned", folder / "base", changed


def contenders(tuned: Path, base: Path, rank: int) -> dict[str, list[str]]:
    """What each runs; ``OUT`` stands for the new adapter."""
    ours = [sys.executable, "-c", OURS, str(tuned), str(base), "OUT", str(rank)]
    found = {"lorastack": [*ours, "0"], "lorastack, exact": [*ours, "1"]}
    mergekit = os.environ.get("MERGEKIT") or shutil.which("mergekit-extract-lora")
    if mergekit:
        models = ["--model", str(tuned), "--base-model", str(base), "--out-path", "OUT"]
        options = ["--max-rank", str(rank), "--no-copy-tokenizer", "--quiet", "-j", "1"]
        found["mergekit-extract-lora"] = [mergekit, *models, *options]
    else:
        print("no mergekit-extract-lora: only the full SVD is there to compare with")
    return found


def error(adapter: Path, tuned: Path, base: Path, names: dict[str, tuple[int, int]]) -> float:
    """The relative error of all weights, from the adapter's own file."""
    factors = load_file(adapter / "adapter_model.safetensors")
    said = json.loads((adapter / "adapter_config.json").read_text())
    scaling = said["lora_alpha"] / said["r"]
    old, new = (load_file(model / "model.safetensors") for model in (base, tuned))
    lost = total = 0.0
    for name in names:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        change = new[name].astype(np.float32) - old[name].astype(np.float32)
        a, b = (factors[f"{key}.lora_{side}.weight"].astype(np.float32) for side in "AB")
        total += float(np.sum(change.astype(np.float64) ** 2))
        lost += float(np.sum((change - scaling * (b @ a)).astype(np.float64) ** 2))
    return (lost / total) ** 0.5


def timed(command: list[str], out: Path) -> float:
    """Seconds of a process."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    words = [str(out) if word == "OUT" else word for word in command]
    done = subprocess.run(words, env={**os.environ, **THREADS}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - start


def main() -> None:
    width, layers, rank, rounds = (int(w) for w in (*sys.argv[1:], *("1024", "4", "32", "3")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tuned, base, names = write_pair(folder, width, layers)
        print(f"width {width}, {layers} layers, {len(names)} matrices, rank {rank}, {rounds} rounds")
        seconds: dict[str, list[float]] = {}
        errors: dict[str, float] = {}
        commands = contenders(tuned, base, rank)
        for _ in range(rounds):
            for name, command in commands.items():
                seconds.setdefault(name, []).append(timed(command, folder / "out"))
                errors[name] = error(folder / "out", tuned, base, names)
        own = seconds["lorastack"]
        for name, took in seconds.items():
            ratios = sorted(a / b for a, b in zip(took, own, strict=True))
            spread = f"{median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) times ours"
            print(f"{name:24} {median(took):8.1f} s  {spread:32} error {errors[name]:.6f}")


if __name__ == "__main__":
    main()
