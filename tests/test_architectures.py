"""Every listed architecture against what llama.cpp's own converter makes of a model of it: names, rows, experts.

tests/fixtures/make_architectures.py runs the converter and writes down where each element of each tensor came from.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest

from lorastack import LoadedLora, LoraDelta, convert_names
from lorastack.base import BaseModel
from lorastack.base.architectures import BY_HF
from lorastack.errors import LoraStackError
from tests.fixtures.make_architectures import FIXTURE

SAID: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text())


@cache
def base_of(model_type: str) -> BaseModel:
    said = SAID[model_type]
    shapes = {name: tuple(shape) for name, shape in said["shapes"].items()}
    return BaseModel("tiny", "hf", said["class"], said["config"], shapes)


def gguf_base_of(model_type: str) -> BaseModel:
    """The same model's GGUF file, as far as names and sizes go."""
    said, arch = SAID[model_type], SAID[model_type]["gguf"]
    hf = base_of(model_type)
    config = {f"{arch}.block_count": hf.layers, f"{arch}.attention.head_count": hf.heads,
              f"{arch}.attention.head_count_kv": hf.kv_heads}  # fmt: skip
    shapes = {name: tuple(shape) for name, shape in said["sizes"].items()}
    return BaseModel("tiny.gguf", "gguf", arch, config, shapes)


def mapped(model_type: str) -> dict[str, list[Any]]:
    return {name: came for name, came in SAID[model_type]["tensors"].items() if isinstance(came, list)}


def sources(model_type: str) -> list[str]:
    """The weights that the GGUF has, each once."""
    return list(dict.fromkeys(matrix[0] for came in mapped(model_type).values() for matrix in came))


def random_delta(model_type: str, name: str, seed: int, rank: int = 3) -> tuple[LoraDelta, np.ndarray]:
    """(an update of that weight, what it adds to the weight as the live model keeps it), in float64."""
    rng = np.random.default_rng(seed)
    base = base_of(model_type)
    shape = base.shapes[name]
    embedding = re.search(r"(embed|wte|wpe|word_embeddings)", name) is not None
    turned = embedding or name in SAID[model_type]["conv1d"] or base.kept_turned(name, "experts") and len(shape) == 3
    n_out, n_in = shape[-2:][::-1] if turned else shape[-2:]
    a = rng.standard_normal((*shape[:-2], rank, n_in)).astype(np.float32)
    b = rng.standard_normal((*shape[:-2], n_out, rank)).astype(np.float32)
    kind = "embedding" if embedding else "experts" if len(shape) == 3 else "linear"
    dense = (b.astype(np.float64) @ a) * 0.5
    return LoraDelta(a, b, 0.5, kind), dense.swapaxes(-1, -2) if turned else dense


def numbers(runs: list[list[int]] | None, count: int) -> np.ndarray:
    if runs is None:
        return np.arange(count)
    return np.concatenate([np.arange(n) * step + first for first, step, n in runs])


def expected(came: list[Any], dense: dict[str, np.ndarray]) -> np.ndarray:
    """What the converter makes of the changes of the weights that a tensor came from."""
    found = []
    for name, expert, turned, rows, columns in came:
        whole = dense[name] if dense[name].ndim == 3 else dense[name][None]
        for matrix in whole if expert == "each" else [whole[expert or 0]]:
            matrix = matrix.T if turned else matrix
            found.append(matrix[numbers(rows, matrix.shape[0])][:, numbers(columns, matrix.shape[1])])
    return np.stack(found)


def dense_of(delta: LoraDelta) -> np.ndarray:
    a, b = (half.astype(np.float64) for half in (delta.a, delta.b))
    whole = b @ a * delta.scaling
    whole = whole.T if delta.kind == "embedding" else whole
    return whole if whole.ndim == 3 else whole[None]


def test_every_listed_class_is_held_against_the_converter() -> None:
    without = {"PhimoeForCausalLM", "MptForCausalLM"}  # under the names that the converter knows them by
    assert set(BY_HF) - without == {said["class"] for said in SAID.values()}


@pytest.mark.parametrize("model_type", SAID)
def test_an_adapter_becomes_what_the_converter_makes_of_the_weights(model_type: str) -> None:
    names = sources(model_type)
    made = {name: random_delta(model_type, name, n) for n, name in enumerate(names)}
    lora = LoadedLora("mine", {name: delta for name, (delta, _) in made.items()}, naming="hf")
    there = convert_names(lora, base_of(model_type), "gguf")
    assert sorted(there.adapters) == sorted(mapped(model_type))
    assert there.metadata["general.architecture"] == SAID[model_type]["gguf"]
    dense = {name: change for name, (_, change) in made.items()}
    for name, came in mapped(model_type).items():
        np.testing.assert_allclose(dense_of(there.adapters[name]), expected(came, dense), atol=1e-5, err_msg=name)
    back = convert_names(there, base_of(model_type), "hf")
    assert sorted(back.adapters) == sorted(names)
    for name in names:
        np.testing.assert_allclose(dense_of(back.adapters[name]), dense_of(lora.adapters[name]), atol=1e-5, err_msg=name)
