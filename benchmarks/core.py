"""Apply against the two bare BLAS products, opening a 200 MB adapter against the bare header read, and reading it.

Run: python benchmarks/core.py
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from timing import interleave, show

from lorastack import LoadedLora, LoraStack

SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
          "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
          "mlp.down_proj": (4096, 14336)}  # fmt: skip
RANK, LAYERS = 40, 32


def bench_apply(size: int, ranks: list[int]) -> None:
    rng = np.random.default_rng(0)
    stack = LoraStack()
    for n, rank in enumerate(ranks):
        a, b = rng.standard_normal((rank, size), np.float32), rng.standard_normal((size, rank), np.float32)
        stack.push(LoadedLora.from_tensors({"w": (a, b)}, alpha=16, name=str(n)), 0.25)
    pack = [d for _, d in stack.terms("w")]
    a_all = np.ascontiguousarray(np.concatenate([d.a for d in pack]))
    b_all = np.ascontiguousarray(np.concatenate([d.b.T for d in pack]))
    s = np.concatenate([np.full(d.rank, 0.25 * d.scaling, np.float32) for d in pack])
    x = rng.standard_normal(size, np.float32)

    def bare() -> np.ndarray:
        return ((a_all @ x) * s) @ b_all

    np.testing.assert_allclose(stack.apply("w", x, size), bare(), rtol=1e-3, atol=1e-2)
    seconds = interleave({"two bare products": bare, "stack.apply": lambda: stack.apply("w", x, size)})
    show(f"apply, one vector at {size} x {size}, ranks {ranks}", seconds, "two bare products")


def write_peft(folder: Path) -> Path:
    tensors = {}
    for layer in range(LAYERS):
        for module, (n_out, n_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = np.zeros((RANK, n_in), np.float16)
            tensors[f"{key}.lora_B.weight"] = np.zeros((n_out, RANK), np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [m.split(".")[1] for m in SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


def write_gguf(path: Path) -> None:
    names = dict(zip(SHAPES, "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split(), strict=True))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for layer in range(LAYERS):
        for module, (n_out, n_in) in SHAPES.items():
            name = f"blk.{layer}.{names[module]}.weight"
            writer.add_tensor(f"{name}.lora_a", np.zeros((RANK, n_in), np.float16))
            writer.add_tensor(f"{name}.lora_b", np.zeros((n_out, RANK), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bench_open(folder: Path) -> None:
    weights = write_peft(folder)
    write_gguf(folder / "adapter.gguf")

    def bare_json() -> object:
        with weights.open("rb") as file:
            return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))

    def library() -> object:
        with safe_open(weights, "np") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    contenders = {
        "bare header read (json)": bare_json,
        "safetensors: names and shapes": library,
        "lorastack.load": lambda: LoadedLora.load(folder),
    }
    title = f"open a PEFT folder of {weights.stat().st_size / 2**20:.0f} MiB, {2 * LAYERS * len(SHAPES)} tensors"
    show(title, interleave(contenders), "bare header read (json)")
    contenders = {"bare read of the file": weights.read_bytes, "load and read": lambda: LoadedLora.load(folder).check()}
    show("read every factor of the PEFT folder", interleave(contenders, 10), "bare read of the file")
    path = folder / "adapter.gguf"
    contenders = {"gguf.GGUFReader": lambda: gguf.GGUFReader(path), "lorastack.load": lambda: LoadedLora.load(path)}
    show(f"open a GGUF file of {path.stat().st_size / 2**20:.0f} MiB", interleave(contenders, 20), "gguf.GGUFReader")


if __name__ == "__main__":
    bench_apply(4096, [16] * 4)
    bench_apply(4096, [64] * 4)
    bench_apply(64, [16] * 4)
    bench_apply(64, [4] * 2)
    with tempfile.TemporaryDirectory() as scratch:
        bench_open(Path(scratch))
