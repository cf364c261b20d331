"""The journey load -> bake -> save -> load: what comes back is the float64 sum of what went in, as its type holds it.

Adapters are made of an input's bytes, each a small choice, so that nearly every input is a sound one; what other
targets have loaded goes the same way.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType as Q
from safetensors.numpy import save_file

from lorastack import LoadedLora, LoraStack, load, save
from lorastack.formats.kohya import FORMAT_KEY
from tests.fuzz.peers import PREFIX

#: Numbers at the edges of types, by a byte.
EDGES = (
    0.0,
    1.0,
    -1.0,
    0.5,
    3e-8,
    6e-8,
    6.1e-5,
    65504.0,
    65520.0,
    1e-38,
    1e-45,
    3e38,
    1e19,
    1e-19,
    1e5,
    1 / 3,
    1e300,
    1e154,
)
#: The first are the sum; what the others make has to be finite.
METHODS = ("cat", "cat", "cat", "linear", "linear", "ties@knots", "ties@core", "ties@dense", "magnitude_prune@knots",
           "magnitude_prune@core", "dare@core", "svd")  # fmt: skip
#: No dense matrix is formed of more numbers.
MOST = 1 << 18
#: Relative step and smallest step of the types that are written.
_STEPS = {"f32": (2.0**-23, 2.0**-148), "f16": (2.0**-10, 2.0**-23), "bf16": (2.0**-7, 2.0**-132)}


class Choices:
    """An input's bytes as choices, one after another; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        byte = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return byte % count

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def number(self) -> float:
        """An edge, its negative, or any number of float32."""
        which = self.below(2 * len(EDGES) + 8)
        if which < 2 * len(EDGES):
            return EDGES[which // 2] * (-1) ** which
        raw = bytes(self.below(256) for _ in range(4))
        return float(struct.unpack("<f", raw)[0])


class Made(NamedTuple):
    """One weight of an adapter as it is written: its factors as stored, and in float64."""

    a: np.ndarray
    b: np.ndarray
    wide_a: np.ndarray
    wide_b: np.ndarray
    kind: str


#: naming -> weight -> kind, shapes of A and B with 0 for the rank.
WEIGHTS: dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]] = {
    "hf": {
        "model.layers.0.self_attn.q_proj.weight": ("linear", (0, 6), (5, 0)),
        "model.layers.10.mlp.up_proj.weight": ("linear", (0, 3), (4, 0)),
        "model.embed_tokens.weight": ("embedding", (0, 9), (4, 0)),
        "model.conv.weight": ("conv", (0, 2, 3, 3), (4, 0, 1, 1)),
    },
    "gguf": {
        "blk.0.attn_q.weight": ("linear", (0, 6), (5, 0)),
        "blk.0.ffn_up.weight": ("linear", (0, 32), (3, 0)),
        "token_embd.weight": ("embedding", (0, 9), (4, 0)),
        "blk.1.ffn_up_exps.weight": ("experts", (2, 0, 4), (2, 5, 0)),
    },
}


def journey(data: bytes, folder: Path) -> None:
    """Make adapters as ``data`` says, and take them all the way."""
    choose = Choices(data)
    naming = choose.of(("hf", "gguf"))
    method, dtype = choose.of(METHODS), choose.of((None, "f32", "f16", "bf16", "q8_0"))
    if dtype == "q8_0" and naming == "hf":
        dtype = None
    truth: dict[str, list[tuple[float, np.ndarray, np.ndarray]]] = {}
    entries = []
    for n in range(1 + choose.below(3)):
        made, alpha, rslora, rank = _adapter(choose, naming)
        scale = choose.number()
        path = _write_gguf(folder / f"{n}.gguf", made, alpha) if naming == "gguf" else _write_peft(
            folder / str(n), made, alpha, rslora, rank)  # fmt: skip
        entries.append((load(path), scale))
        for name, one in made.items():
            ranks = one.wide_a.shape[1 if one.kind == "experts" else 0]
            scaling = (alpha / (math.sqrt(ranks) if rslora else ranks)) if alpha or naming == "hf" else 1.0
            truth.setdefault(name, []).append((scale * scaling, *_flat(one.wide_a, one.wide_b, one.kind)))
    follow(entries, truth, folder, dtype, method)


def on(lora: LoadedLora, folder: Path) -> None:
    """Take what a reader has loaded all the way: alone, and with itself."""
    plain = lora.without_extras() if lora.extras else lora
    if any(math.prod((d.in_features, d.out_features, d.num_experts or 1)) > MOST for d in plain.adapters.values()):
        return
    flat = {name: _flat(d.a.astype(np.float64), d.b.astype(np.float64), d.kind) for name, d in plain.adapters.items()}
    for scales in ((1.0,), (-0.3, 2.5)):
        truth = {
            name: [(scale * plain.adapters[name].scaling, *factors) for scale in scales]
            for name, factors in flat.items()
        }
        follow([(plain, scale) for scale in scales], truth, folder, None, "cat")


def follow(
    entries: list[tuple[LoadedLora, float]],
    truth: dict[str, list[tuple[float, np.ndarray, np.ndarray]]],
    folder: Path,
    dtype: str | None,
    method: str,
) -> None:
    """Bake, save and load, and hold the result against ``truth``: for each weight (multiplier, A, B) in float64."""
    format, place = _written_as(entries[0][0])
    more: dict[str, Any] = {"rank": 2} if method == "svd" else {"density": 0.5} if "@" in method else {}
    baked = LoraStack(entries).bake(method=method, **more)
    again = load(save(baked, folder / place, format=format, dtype=dtype, force=True))
    again.check()
    assert set(again.adapters) == set(truth)
    for name, terms in truth.items():
        delta = again.adapters[name]
        a, b = _flat(delta.a.astype(np.float64), delta.b.astype(np.float64), delta.kind)
        assert np.isfinite(a).all(), f"{name}: A is not finite"
        assert np.isfinite(b).all(), f"{name}: B is not finite"
        if method not in ("cat", "linear"):
            continue
        with np.errstate(all="ignore"):
            expected = sum(times * (tb @ ta) for times, ta, tb in terms)
            size = sum(abs(times) * (np.abs(tb) @ np.abs(ta)) for times, ta, tb in terms)
            found = delta.scaling * (b @ a)
            allowed = _allowed(a, b, delta.scaling, [f.stored for f in delta.factors]) + 2.0**-20 * size
            if method != "cat":
                allowed = allowed + 1e-5 * np.sqrt((size**2).sum())  # experts are cut alike
            off = np.abs(found - expected) - allowed
        if np.isfinite(expected).all() and np.isfinite(allowed).all():
            assert np.isfinite(found).all(), f"{name}: not finite"
            assert (off <= 1e-300).all(), f"{name}: {off.max():g} further from the sum than its type, {dtype}, explains"


def _written_as(lora: LoadedLora) -> tuple[Any, str]:
    """(format, name): that which the adapter came from."""
    said = str(lora.metadata.get(FORMAT_KEY, "gguf" if lora.naming == "gguf" else "peft")).lower()
    return said, {"gguf": "out.gguf", "peft": "out", "mlx": "out"}.get(said, "out.safetensors")


def _allowed(a: np.ndarray, b: np.ndarray, scaling: float, stored: list[str]) -> np.ndarray:
    """How far B @ A may be off when each number of both was rounded to the type it is stored in."""
    off_a, off_b = (_rounding(x, kind) for x, kind in zip((a, b), stored, strict=True))
    return abs(scaling) * (np.abs(b) @ off_a + off_b @ np.abs(a) + off_b @ off_a)


def _rounding(array: np.ndarray, stored: str) -> np.ndarray:
    if stored == "Q8_0":  # a step of 127th of the largest of a row's blocks, and that in float16
        return np.broadcast_to(np.abs(array).max(-1, keepdims=True) / 100 + 1e-5, array.shape)
    short = {"F16": "f16", "float16": "f16", "BF16": "bf16", "bfloat16": "bf16"}.get(stored, "f32")
    step, least = _STEPS[short]
    return np.abs(array) * step + least


def _flat(a: np.ndarray, b: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Factors as matrices, experts in front."""
    if kind == "conv":
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return (a, b) if kind == "experts" else (a[None], b[None])


# ---- made of choices ----------------------------------------------------------------------------


def _adapter(choose: Choices, naming: str) -> tuple[dict[str, Made], float, bool, int]:
    """Weights, alpha, whether by the square root, and the rank that the configuration says."""
    rank, alpha, rslora = 1 + choose.below(4), choose.number(), naming == "hf" and choose.below(4) == 0
    if naming == "gguf":
        with np.errstate(all="ignore"):
            alpha = float(np.float32(alpha))  # as the file holds it
    types = ("f32", "f16", "bf16", "q8_0") if naming == "gguf" else ("f32", "f16", "bf16", "f64")
    rng = np.random.default_rng(choose.below(256))
    names = list(WEIGHTS[naming])
    made: dict[str, Made] = {}
    for name in [names[0], *(one for one in names[1:] if choose.below(2))]:
        kind, *shapes = WEIGHTS[naming][name]
        own = 1 + choose.below(4) if choose.below(4) == 0 else rank
        stored = choose.of(types)
        factors = []
        for shape in shapes:
            whole = tuple(own if n == 0 else n for n in shape)
            factors.append(_stored(_numbers(choose, rng, whole), stored))
        (a, wide_a), (b, wide_b) = factors
        made[name] = Made(a, b, wide_a, wide_b, kind)
    return made, alpha, rslora, rank


def _numbers(choose: Choices, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(all="ignore"):
        array = (rng.standard_normal(shape) * choose.number()).reshape(-1)
        for _ in range(choose.below(4)):
            array[choose.below(array.size)] = choose.number()
    return array.reshape(shape)


def _stored(array: np.ndarray, stored: str) -> tuple[np.ndarray, np.ndarray]:
    """The array in that type, and what the type made of it, in float64."""
    with np.errstate(all="ignore"):
        if stored == "q8_0" and array.shape[-1] % 32 == 0 and np.abs(array).max() < 1e5:
            packed = gguf.quants.quantize(array.astype(np.float32), Q.Q8_0)
            return packed, gguf.quants.dequantize(packed, Q.Q8_0).astype(np.float64)
        kinds: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
        kept = array.astype(kinds.get(stored, np.float32))
        return kept, kept.astype(np.float64)


def _write_gguf(path: Path, made: dict[str, Made], alpha: float) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, one in made.items():
        for part, array in (("a", one.a), ("b", one.b)):
            if one.kind == "embedding" and part == "a":
                array = np.ascontiguousarray(array.T)
            kind = {"uint8": Q.Q8_0, "float16": Q.F16, "bfloat16": Q.BF16}.get(array.dtype.name, Q.F32)
            writer.add_tensor(f"{name}.lora_{part}", array.view(np.uint8) if kind == Q.BF16 else array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_peft(folder: Path, made: dict[str, Made], alpha: float, rslora: bool, rank: int) -> Path:
    folder.mkdir()
    tensors, ranks = {}, {}
    for name, one in made.items():
        module = name.removesuffix(".weight")
        ends = ("embedding_A", "embedding_B") if one.kind == "embedding" else ("A.weight", "B.weight")
        for end, array in zip(ends, (one.a, one.b), strict=True):
            tensors[f"{PREFIX}{module}.lora_{end}"] = array
        if len(one.a) != rank:
            ranks[module] = len(one.a)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
