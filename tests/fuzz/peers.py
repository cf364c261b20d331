"""Peers: what gguf, safetensors and PEFT's rules find in the bytes that were loaded: the adapter holds the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import regex
from safetensors.numpy import load as load_safetensors

from lorastack import LoadedLora
from lorastack.formats.peft import NOTES_KEY, RECIPE_KEY

PREFIX = "base_model.model."


def check_against_gguf(path: Path, lora: LoadedLora) -> None:
    """What was loaded is what gguf's own reader finds in the same bytes."""
    reader = gguf.GGUFReader(path)
    with np.errstate(all="ignore"):
        tensors = {t.name: _numbers(t) for t in reader.tensors}
    alpha = next((reader.fields[k].contents() for k in ("adapter.lora.alpha", "lora.alpha") if k in reader.fields), 0)
    used = set()
    for name, delta in lora.adapters.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        same(delta.a, a.T if name == "token_embd.weight" else a, name)
        same(delta.b, b, name)
        assert delta.scaling == (alpha / b.shape[-1] if alpha else 1.0), name
        used |= {f"{name}.lora_a", f"{name}.lora_b"}
    for name, norm in lora.extras.get("norm", {}).items():
        same(norm.raw(), tensors[name], name)
        used.add(name)
    assert used == set(tensors)
    # Vocabularies are passed over.
    said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith(("GGUF.", "tokenizer."))}
    found = {k: value for k, value in lora.metadata.items() if not k.startswith("tokenizer.")}
    assert repr(found) == repr(said), f"{found} and {said}"


def _numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's numbers; F64, which the package does not take for a packed type, as they are."""
    plain = tensor.tensor_type == gguf.GGMLQuantizationType.F64
    return tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def check_against_peft(folder: Path, lora: LoadedLora) -> None:
    """What was loaded is what the safetensors package and PEFT's rules find in the same bytes."""
    config = json.loads((folder / "adapter_config.json").read_bytes(), parse_int=_whole)
    try:
        tensors = load_safetensors((folder / "adapter_model.safetensors").read_bytes())
    except KeyError:  # a type that the package gives to torch only
        return
    if NOTES_KEY in lora.metadata:  # keys that are read under other names, or not at all
        return
    used = set()
    for name, delta in lora.adapters.items():
        module = name.removesuffix(".weight")
        ends = (
            (".lora_embedding_A", ".lora_embedding_B")
            if delta.kind == "embedding"
            else (".lora_A.weight", ".lora_B.weight")
        )
        keys = [f"{PREFIX}{module}{end}" for end in ends]
        if delta.kind != "experts":  # which PEFT keeps in two dimensions
            same(delta.a, tensors[keys[0]], name)
            same(delta.b, tensors[keys[1]], name)
            rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
            alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            assert delta.rank == rank, name
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            assert math.isclose(delta.scaling, scaling, rel_tol=1e-12), (name, delta.scaling, scaling)
        used |= set(keys)
    # The rest of the file is kept, under its own name, whatever it is.
    rest = [value for values in lora.extras.values() for value in values.values() if hasattr(value, "raw")]
    if "target_parameters" not in config and "trainable_token_indices" not in config:
        assert len(rest) == len(tensors) - len(used)
    for value in rest:
        same(value.raw(), tensors[value.label.partition(": tensor ")[2]], value.label)
    said = {key: value for key, value in lora.metadata.items() if key != RECIPE_KEY}
    assert repr(said) == repr(config), f"{said} and {config}"


def check_against_pairs(path: Path, lora: LoadedLora) -> None:
    """Plain pairs are what the safetensors package finds, with kohya's scaling: ``alpha / dim``, 0 and none are 1."""
    try:
        tensors = load_safetensors(path.read_bytes())
    except KeyError:  # a type that the package gives to torch only
        return
    for delta in lora.adapters.values():
        key_a, key_b = (factor.label.partition(": tensor ")[2] for factor in delta.factors)
        if not key_a.endswith((".lora_down.weight", ".lora_A.weight")) or key_b not in tensors or key_a not in tensors:
            continue  # made of other factors
        same(delta.a, tensors[key_a], key_a)
        same(delta.b, tensors[key_b], key_b)
        alpha = tensors.get(f"{key_a.rpartition('.lora_')[0]}.alpha")
        if "lora_adapter_metadata" not in lora.metadata:
            said = 0.0 if alpha is None else float(alpha.reshape(-1)[0])
            assert delta.scaling == (said / delta.rank if said else 1.0), key_a


def _whole(digits: str) -> float:
    """JSON has no end of whole numbers; beyond 64 bits they are read as floats, as JavaScript does."""
    return int(digits) if len(digits) < 21 and -(1 << 63) <= int(digits) < 1 << 64 else float(digits)


def same(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """The same numbers, NaN at the same places."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, {expected.shape}"
    with np.errstate(all="ignore"):
        wide = found.astype(np.float64), expected.astype(np.float64)
    assert np.array_equal(*wide, equal_nan=True), f"{name}: other numbers"


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule, by the ``regex`` package: Python's own cannot be stopped."""
    hits = (v for k, v in (pattern or {}).items() if regex.match(rf"(?!)|(.*\.)?({k})$", module, timeout=2))
    return next(hits, default)
