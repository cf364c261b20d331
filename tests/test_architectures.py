"""Every listed architecture against what llama.cpp's own converter makes of a model of it: names, rows, experts.

tests/fixtures/make_architectures.py runs the converter and writes down where each element of each tensor came from.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lorastack import LoadedLora, LoraDelta, LoraStack, convert_names, load, merge
from lorastack.base import BaseModel, open_base
from lorastack.base.architectures import BY_HF, REFUSED, architecture_of
from lorastack.errors import FormatError, LoraStackError, NamingError, UnsupportedError
from lorastack.formats.gguf_left_out import BY_ARCHITECTURE, EVERYWHERE
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


#: Weights with a place in GGUF, those of several tensors among them.
ALL_SOURCES = {
    name: {matrix[0] for came in mapped(name).values() for matrix in came}
    | {
        weight
        for weight in said["shapes"]
        if weight.endswith("lm_head.weight") and "output.weight" not in said["tensors"]
    }
    for name, said in SAID.items()
}


def sources(model_type: str) -> list[str]:
    """The weights that the GGUF has, each once."""
    found = dict.fromkeys(matrix[0] for came in mapped(model_type).values() for matrix in came)
    return [name for name in found if ".altup_" not in name or "projections" not in name]


def random_delta(model_type: str, name: str, seed: int, rank: int = 3) -> tuple[LoraDelta, np.ndarray]:
    """(an update of that weight, what it adds to the weight as the live model keeps it), in float64."""
    rng = np.random.default_rng(seed)
    base = base_of(model_type)
    shape = base.shapes[name]
    embedding = re.search(r"(embed|wte|wpe|word_embeddings)", name) is not None
    turned = embedding or name in SAID[model_type]["conv1d"] or (base.kept_turned(name, "experts") and len(shape) == 3)
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


def adapter_of(model_type: str, names: list[str]) -> tuple[LoadedLora, dict[str, np.ndarray]]:
    """(an adapter of these weights, what it adds to each)."""
    made = {name: random_delta(model_type, name, n) for n, name in enumerate(names)}
    deltas = {name: delta for name, (delta, _) in made.items()}
    return LoadedLora("mine", deltas, naming="hf"), {name: change for name, (_, change) in made.items()}


def assert_equal(found: LoadedLora, wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found.adapters) == sorted(wanted)
    for name, dense in wanted.items():
        np.testing.assert_allclose(dense_of(found.adapters[name]), dense, atol=1e-5, err_msg=name)


def wanted_of(model_type: str, dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: expected(came, dense)
        for name, came in mapped(model_type).items()
        if {matrix[0] for matrix in came} <= set(dense)
    }


def test_every_listed_class_is_held_against_the_converter() -> None:
    elsewhere = {"PhimoeForCausalLM", "MptForCausalLM"}  # under the names that the converter knows them by
    wrappers = {"Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"}  # listed by their text model
    assert set(BY_HF) - elsewhere == {said["class"] for said in SAID.values()} - wrappers
    assert len(SAID) >= 65
    assert FIXTURE.stat().st_size < 300_000


@pytest.mark.parametrize("model_type", SAID)
def test_an_adapter_becomes_what_the_converter_makes_of_the_weights_and_comes_back(model_type: str) -> None:
    base = base_of(model_type)
    lora, dense = adapter_of(model_type, sources(model_type))
    there = convert_names(lora, base, "gguf")
    assert_equal(there, wanted_of(model_type, dense))
    assert there.metadata["general.architecture"] == SAID[model_type]["gguf"]
    assert_equal(convert_names(there, base, "hf"), {name: dense_of(delta) for name, delta in lora.adapters.items()})


@pytest.mark.parametrize("model_type", SAID)
def test_a_gguf_base_gives_the_same_as_the_folder_it_was_made_from(model_type: str) -> None:
    base = gguf_base_of(model_type)
    names = [n for n in sources(model_type) if not ("embed" in n or "wte" in n) or "output.weight" in base.shapes]
    lora, dense = adapter_of(model_type, names)
    if SAID[model_type]["gguf"] == "granitehybrid":
        with pytest.raises(UnsupportedError, match=r"architecture 'granitehybrid': .* the file is of Bamba as well"):
            convert_names(lora, base)
        return
    assert_equal(convert_names(lora, base), wanted_of(model_type, dense))


@pytest.mark.parametrize("model_type", SAID)
def test_what_the_converter_has_no_place_for_is_refused_by_name(model_type: str) -> None:
    base = base_of(model_type)
    others = [name for name in base.shapes if name not in ALL_SOURCES[model_type]]
    for name in others:
        shape = base.shapes[name]
        n_out, n_in, kernel = shape[0], shape[1], shape[2:]
        a = np.ones((2, n_in, *kernel), np.float32)
        b = np.ones((n_out, 2, *(1 for _ in kernel)), np.float32)
        delta = LoraDelta(a, b, kind="conv" if kernel else "linear")
        if base.misfit(name, delta):
            continue  # no layer of its own
        with pytest.raises(LoraStackError, match=re.escape(name)):
            convert_names(LoadedLora("mine", {name: delta}, naming="hf"), base, "gguf")


MOE = [name for name, said in SAID.items() if any("_exps" in tensor for tensor in said["tensors"])]


@pytest.mark.parametrize("model_type", MOE)
def test_a_file_of_experts_is_read_again_as_it_was_written(model_type: str, tmp_path: Path) -> None:
    base = base_of(model_type)
    lora, dense = adapter_of(model_type, [name for name in sources(model_type) if ".experts." in name])
    path = convert_names(lora, base, "gguf").save(tmp_path / "mine.gguf")
    assert all(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight", name) for name in load(path).adapters)
    assert_equal(load(path), wanted_of(model_type, dense))
    back = convert_names(load(path), base, "hf")
    assert_equal(back, {name: dense_of(delta) for name, delta in lora.adapters.items()})


@pytest.mark.parametrize("part", ["gate", "up"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "olmoe"])
def test_gate_alone_and_up_alone_come_back_into_the_parameter_of_both(model_type: str, part: str) -> None:
    base = base_of(model_type)
    names = [name for name in sources(model_type) if re.search(r"layers\.0\.[a-z_]+\.experts\.gate_up_proj", name)]
    lora, _ = adapter_of(model_type, names)
    there = convert_names(lora, base, "gguf")
    name = f"blk.0.ffn_{part}_exps.weight"
    one = replace(there, adapters={name: there.adapters[name]})
    back = convert_names(one, base, "hf")
    (found,) = back.adapters.values()
    assert list(back.adapters) == list(lora.adapters)
    again = convert_names(back, base, "gguf")
    np.testing.assert_allclose(dense_of(again.adapters[name]), dense_of(there.adapters[name]), atol=1e-6)
    other = next(n for n in again.adapters if n != name)
    assert not dense_of(again.adapters[other]).any()
    assert (dense_of(found) != 0).mean() == 0.5  # half of its rows, or of its columns where it is turned


# ---- DeepSeek's latent attention


def latent(tmp: str = "deepseek_v2") -> tuple[BaseModel, LoadedLora]:
    base = base_of(tmp)
    lora, _ = adapter_of(tmp, [name for name in sources(tmp) if "kv_b_proj" in name])
    return base, lora


def test_kv_b_proj_comes_back_at_its_own_rank_and_to_the_bit() -> None:
    base, lora = latent()
    back = convert_names(convert_names(lora, base, "gguf"), base, "hf")
    for name, delta in lora.adapters.items():
        found = back.adapters[name]
        np.testing.assert_array_equal(found.a, delta.a)
        np.testing.assert_array_equal(found.b, delta.b)
        assert (found.scaling, found.rank) == (delta.scaling, delta.rank)


def test_k_and_v_by_themselves_or_with_factors_of_their_own_come_back_exactly() -> None:
    base, lora = latent()
    there = convert_names(lora, base, "gguf")
    k, v = (there.adapters[f"blk.0.attn_{part}_b.weight"] for part in "kv")
    other = convert_names(
        LoadedLora("o", {n: d.scaled(3) for n, d in lora.adapters.items()}, naming="hf"), base, "gguf"
    )
    for given, rank in (({"k": k}, 3), ({"v": v}, 3), ({"k": k, "v": other.adapters["blk.0.attn_v_b.weight"]}, 6)):
        one = replace(there, adapters={f"blk.0.attn_{part}_b.weight": delta for part, delta in given.items()})
        back = convert_names(one, base, "hf")
        assert [delta.rank for delta in back.adapters.values()] == [rank]
        again = convert_names(back, base, "gguf")
        for part in "kv":
            name = f"blk.0.attn_{part}_b.weight"
            wanted = dense_of(given[part]) if part in given else np.zeros_like(dense_of(again.adapters[name]))
            np.testing.assert_allclose(dense_of(again.adapters[name]), wanted, atol=1e-5)


def test_heads_with_factors_of_their_own_are_refused() -> None:
    base, lora = latent()
    there = convert_names(lora, base, "gguf")
    k = there.adapters["blk.0.attn_k_b.weight"]
    b = k.b.copy()
    b[1] += 1
    one = replace(there, adapters={"blk.0.attn_k_b.weight": LoraDelta(k.a, b, k.scaling)})
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_k_b\.weight: each head has factors of its own"):
        convert_names(one, base, "hf")


def test_rows_that_are_no_heads_are_refused_with_both_sizes() -> None:
    base, lora = latent()
    (name, *_), delta = list(lora.adapters), next(iter(lora.adapters.values()))
    short = LoraDelta(delta.a, delta.b[:-1], kind="linear")
    with pytest.raises(NamingError, match="has 55 rows, expected 4 heads of 8 and 6"):
        convert_names(LoadedLora("mine", {name: short}, naming="hf"), base, "gguf")


def test_an_older_gguf_keeps_kv_b_proj_whole() -> None:
    gguf = gguf_base_of("deepseek_v2")
    shapes = {name: shape for name, shape in gguf.shapes.items() if not name.endswith(("k_b.weight", "v_b.weight"))}
    older = replace(gguf, shapes=shapes | {f"blk.{n}.attn_kv_b.weight": (56, 20) for n in (0, 1)})
    _, lora = latent()
    there = convert_names(lora, older)
    assert list(there.adapters) == ["blk.0.attn_kv_b.weight", "blk.1.attn_kv_b.weight"]
    for found, delta in zip(there.adapters.values(), lora.adapters.values(), strict=True):
        np.testing.assert_array_equal(found.b, delta.b)


# ---- what is refused, and why


@pytest.mark.parametrize(
    ("model_type", "weight"),
    [
        ("deepseek_v2", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("deepseek_v2", "model.layers.0.self_attn.q_a_proj.weight"),
        ("deepseek_v2", "lm_head.weight"),
        ("minicpm3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        ("gemma3n_text", "model.per_layer_model_projection.weight"),
        ("gpt2", "transformer.wpe.weight"),
    ],
)
def test_what_llama_cpp_would_leave_out_is_not_written(model_type: str, weight: str, tmp_path: Path) -> None:
    lora, _ = adapter_of(model_type, [weight])
    there = convert_names(lora, base_of(model_type), "gguf")
    with pytest.raises(FormatError, match=r"llama\.cpp adds no update to this tensor at run time; leave it out"):
        there.save(tmp_path / "mine.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_settled_is_refused_with_a_reason_and_a_way_out(name: str) -> None:
    naming = "hf" if name[0].isupper() else "gguf"
    with pytest.raises(UnsupportedError) as caught:
        architecture_of(name, naming)
    assert REFUSED[name] in str(caught.value)
    assert "attach it, or merge it into the Hugging Face base and convert that" in str(caught.value)


def test_the_docs_name_every_architecture_and_everything_that_is_left_out() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gguf.md").read_text()
    said = {*re.findall(r"`([^`]+)`", page)}
    assert {name for name in (*BY_HF, *REFUSED) if name[0].isupper()} - said == set()
    assert {*BY_ARCHITECTURE, *EVERYWHERE, *frozenset().union(*BY_ARCHITECTURE.values())} - said == set()


# ---- falcon's groups, by its configuration


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"multi_query": True, "num_kv_heads": 4}, 1),  # a number that transformers does not look at
        ({"multi_query": False}, 4),
    ],
)
def test_falcons_groups_are_those_that_transformers_computes_with(config: dict[str, Any], groups: int) -> None:
    said = {"model_type": "falcon", "num_hidden_layers": 1, "num_attention_heads": 4} | config
    name = "transformer.h.0.self_attention.query_key_value.weight"
    rows = (4 + 2 * groups) * 2
    base = BaseModel("tiny", "hf", "FalconForCausalLM", said, {name: (rows, 8)})
    b = np.arange(rows, dtype=np.float32)[:, None]
    lora = LoadedLora.from_tensors({name: (np.ones((1, 8), np.float32), b)})
    (found,) = convert_names(lora, base).adapters.values()
    each = 4 // groups
    by_group = np.arange(rows).reshape(groups, each + 2, 2)
    wanted = np.concatenate([by_group[:, :-2].reshape(-1), by_group[:, -2].reshape(-1), by_group[:, -1].reshape(-1)])
    np.testing.assert_array_equal(found.b[:, 0], wanted)


# ---- merged into a GGUF base


@pytest.mark.parametrize("model_type", ["falcon", "deepseek_v2", "gpt_oss", "llama4_text", "granitemoe", "gemma3"])
def test_merged_into_a_gguf_base_the_tensors_change_as_the_converter_would_have_it(
    model_type: str, tmp_path: Path
) -> None:
    said, rng = SAID[model_type], np.random.default_rng(0)
    heads = {"attention.head_count": base_of(model_type).heads, "attention.head_count_kv": base_of(model_type).kv_heads}
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", said["gguf"])
    for key, value in (heads | {"block_count": base_of(model_type).layers}).items():
        writer.add_uint32(f"{said['gguf']}.{key}", value)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in said["sizes"].items()}
    for name, array in weights.items():
        writer.add_tensor(name, array)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    lora, dense = adapter_of(model_type, sources(model_type))
    merged = open_base(merge(tmp_path / "base.gguf", LoraStack([(lora, 2.0)]), tmp_path / "new.gguf").out)
    for name, change in wanted_of(model_type, dense).items():
        wanted = weights[name] + 2 * change.reshape(weights[name].shape)
        np.testing.assert_allclose(merged.weight(name), wanted, atol=1e-4, err_msg=name)
