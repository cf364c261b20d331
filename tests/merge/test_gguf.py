"""Merged GGUF files: what llama.cpp computes with them, which bytes stay, which types are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load, merge
from lorastack.base import open_base
from lorastack.errors import ArgumentError, FormatError, UnsupportedError
from lorastack.merging.packing import pack, packable
from tests.fixtures.make_logits import llama_cpp_logits
from tests.models import cases

Q4_K_M = 15
WIDTH, INNER, LAYERS, VOCABULARY = 512, 1536, 2, 320


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}


# ---- the real llama.cpp, with the merged file and with the adapters live


def test_merged_cases_give_llama_cpps_live_logits(shared: Path, llama_cpp: object, tmp_path: Path) -> None:
    folder = shared / "gguf_cases"
    arrays = np.load(folder / "logits_llama_cpp.npz")
    seen = set()
    for case in json.loads((folder / "logits_llama_cpp.json").read_text()):
        if not case["stack"]:
            continue
        stack = LoraStack([(load(folder / name), scale) for name, scale in case["stack"]])
        quantised = case["base"] == "base_q8_0.gguf"
        out = tmp_path / f"{case['key']}.gguf"
        merge(folder / case["base"], stack, out, verify=True, outtype="f32" if quantised else None)
        found = llama_cpp_logits(out, [], case["tokens"])
        halves = any(name == "lora_b.gguf" for name, _ in case["stack"])
        np.testing.assert_allclose(
            found, arrays[case["key"]], atol=0.2 if quantised else 1e-3 if halves else 1e-4, rtol=0, err_msg=str(case)
        )
        seen.add(case["base"])
    assert seen >= {"base.gguf", "base_moe.gguf", "base_q8_0.gguf"}


def test_merged_stories_give_llama_cpps_live_logits(shared: Path, llama_cpp: object, tmp_path: Path) -> None:
    folder = shared / "stories260k"
    done: dict[str, Path] = {}
    for _, words, tokens, expected in cases(folder, "llama_cpp"):
        if any(".f16" in name for name, _ in words) or not words:
            continue
        key = json.dumps(words)
        if key not in done:
            done[key] = tmp_path / f"{len(done)}.gguf"
            stack = LoraStack([(load(folder / "gguf" / f"{name}.gguf"), scale) for name, scale in words])
            merge(folder / "base.gguf", stack, done[key])
        np.testing.assert_allclose(llama_cpp_logits(done[key], [], tokens), expected, atol=1e-4, rtol=0, err_msg=key)
    assert len(done) >= 4


def test_dora_and_names_of_the_other_kind_give_pefts_logits(shared: Path, llama_cpp: object, tmp_path: Path) -> None:
    folder = shared / "stories260k"
    seen = 0
    for key, words, tokens, expected in cases(folder, "peft"):
        if not any("dora" in name for name, _ in words):
            continue
        out = tmp_path / f"{key}.gguf"
        merge(folder / "base.gguf", LoraStack([(load(folder / "adapters" / n), s) for n, s in words]), out)
        np.testing.assert_allclose(llama_cpp_logits(out, [], tokens), expected, atol=1e-4, rtol=0, err_msg=key)
        seen += 1
    assert seen


def test_a_tied_embedding_becomes_two_tensors(shared: Path, llama_cpp: object, tmp_path: Path) -> None:
    base, tokens = shared / "gguf_cases/base_tied.gguf", [1, 5, 9, 30]
    merge(base, load(shared / "gguf_cases/lora_embd.gguf"), tmp_path / "out.gguf", verify=True)
    before, after = tensors(base), tensors(tmp_path / "out.gguf")
    assert set(after) == {*before, "output.weight"}
    assert after["output.weight"].data.tobytes() == before["token_embd.weight"].data.tobytes()
    delta = load(shared / "gguf_cases/lora_embd.gguf").adapters["token_embd.weight"]
    wanted = numbers(before["token_embd.weight"]) + delta.dense().T
    np.testing.assert_allclose(numbers(after["token_embd.weight"]), wanted, atol=1e-6)
    assert np.isfinite(llama_cpp_logits(tmp_path / "out.gguf", [], tokens)).all()
    plain = load(shared / "gguf_cases/lora_alpha0.gguf")
    merge(base, plain, tmp_path / "plain.gguf")
    assert set(tensors(tmp_path / "plain.gguf")) == set(before)
    expected = llama_cpp_logits(base, [(shared / "gguf_cases/lora_alpha0.gguf", 1.0)], tokens)
    np.testing.assert_allclose(llama_cpp_logits(tmp_path / "plain.gguf", [], tokens), expected, atol=1e-4, rtol=0)


# ---- K types, on a model wide enough for their blocks of 256


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in F32."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(WIDTH // 8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += [f"w{n}" for n in range(VOCABULARY - len(pieces))]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output.weight": (VOCABULARY, WIDTH)}
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in {
            "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER)}.items()}  # fmt: skip
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.04).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def packed(wide: Path, llama_cpp: Any) -> Path:
    """The same as llama.cpp itself quantises it to Q4_K_M."""
    out = wide.with_name("wide-q4_k_m.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q4_K_M, 1
    assert llama_cpp.llama_model_quantize(str(wide).encode(), str(out).encode(), params) == 0
    return out


def adapter(size: float, names: tuple[str, ...] = ("attn_q", "ffn_down", "attn_v"), seed: int = 1) -> LoadedLora:
    rng = np.random.default_rng(seed)
    shapes = {"attn_q": (WIDTH, WIDTH), "ffn_down": (WIDTH, INNER), "attn_v": (WIDTH // 2, WIDTH)}
    factors = {
        f"blk.{n}.{name}.weight": (
            rng.standard_normal((4, shapes[name][1]), np.float32),
            size * 0.02 * rng.standard_normal((shapes[name][0], 4)).astype(np.float32),
        )
        for n in range(LAYERS)
        for name in names
    }
    return LoadedLora.from_tensors(factors, name="made", naming="gguf")


def test_k_types_return_to_themselves_and_all_other_bytes_stay(packed: Path, llama_cpp: object, tmp_path: Path) -> None:
    lora = adapter(1.0)
    done = merge(packed, LoraStack([(lora, 0.5)]), tmp_path / "out.gguf", verify=True)
    before, after = tensors(packed), tensors(tmp_path / "out.gguf")
    assert list(after) == list(before)
    kinds = {after[name].tensor_type.name for name in lora.adapters}
    assert {"Q4_K", "Q6_K"} <= kinds
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        assert (after[name].data.tobytes() == tensor.data.tobytes()) is (name not in lora.adapters), name
    for name, delta in lora.adapters.items():
        wanted = numbers(before[name]) + 0.5 * delta.dense()
        ours = np.linalg.norm(numbers(after[name]) - wanted)
        again = gguf.quants.dequantize(
            pack(wanted.astype(np.float32), after[name].tensor_type.name).reshape(after[name].data.shape),
            after[name].tensor_type,
        )
        assert ours <= 1.001 * np.linalg.norm(again - wanted)
        assert ours < 0.1 * np.linalg.norm(wanted)
    old, new = fields(packed), fields(tmp_path / "out.gguf")
    assert new.pop("lorastack.recipe")[1].startswith("base = ")
    assert new == old
    assert {one.weight for one in done.verified} == set(lora.adapters)
    tokens = [1, 300, 301, 302]
    plain, merged = (llama_cpp_logits(path, [], tokens) for path in (packed, tmp_path / "out.gguf"))
    live = llama_cpp_logits(packed, [(saved(lora, tmp_path / "a.gguf"), 0.5)], tokens)
    assert np.abs(merged - live).max() < 0.35 * np.abs(live - plain).max()


def saved(lora: LoadedLora, path: Path) -> Path:
    return lora.save(path, architecture="llama")


def test_four_bits_keep_little_of_a_small_update_and_the_estimate_says_so(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "q4_0.gguf"
    merge(packed, adapter(1e-6), tmp_path / "first.gguf", outtype="q4_0")
    small = adapter(0.02)
    done = merge(tmp_path / "first.gguf", small, out, verify=True)
    for one, found in zip(done.survivals, done.verified, strict=True):
        assert one.kind == "Q4_0"
        assert one.kept < 0.2, one
        assert found.error == pytest.approx(one.error, rel=0.4)
    better = merge(packed, small, tmp_path / "f16.gguf", outtype="f16")
    assert min(one.kept for one in better.survivals) > 0.95
    # What most weights are is said anew.
    assert fields(tmp_path / "f16.gguf")["general.file_type"][1] == fields(packed)["general.file_type"][1]


def test_the_file_type_follows_what_most_weights_are(wide: Path, tmp_path: Path) -> None:
    every = {
        name: (np.ones((1, tensor.shape[0]), np.float32), np.zeros((tensor.shape[1], 1), np.float32))
        for name, tensor in tensors(wide).items()
        if len(tensor.shape) == 2 and name != "token_embd.weight"
    }
    merge(wide, LoadedLora.from_tensors(every, naming="gguf"), tmp_path / "out.gguf", outtype="q8_0")
    assert fields(tmp_path / "out.gguf")["general.file_type"][1] == gguf.LlamaFileType.MOSTLY_Q8_0
    found = tensors(tmp_path / "out.gguf")
    assert {found[name].tensor_type.name for name in every} == {"Q8_0"}


def test_types_that_need_an_importance_matrix_are_refused_or_given_one(
    wide: Path, llama_cpp: object, tmp_path: Path
) -> None:
    lora = adapter(1.0, ("attn_q",))
    with pytest.raises(UnsupportedError, match=r"attn_q.weight: its type IQ2_XXS is packed by an importance matrix; "):
        merge(wide, lora, tmp_path / "out.gguf", outtype="iq2_xxs")
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    writer.add_type("imatrix")
    rng = np.random.default_rng(0)
    weights = {name: rng.uniform(0.1, 4, WIDTH).astype(np.float32) for name in lora.adapters}
    for name, values in weights.items():
        writer.add_tensor(f"{name}.in_sum2", 3 * values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old = len(weights).to_bytes(4, "little") + b"".join(
        len(name).to_bytes(4, "little") + name.encode() + (3).to_bytes(4, "little") + WIDTH.to_bytes(4, "little")
        + (3 * values).tobytes()
        for name, values in weights.items()
    )  # fmt: skip
    (tmp_path / "imatrix.dat").write_bytes(old)
    for ending in ("gguf", "dat"):
        merge(wide, lora, tmp_path / f"{ending}.gguf", outtype="iq2_xxs", imatrix=tmp_path / f"imatrix.{ending}")
        found = tensors(tmp_path / f"{ending}.gguf")
        for name, values in weights.items():
            wanted = numbers(tensors(wide)[name]) + lora.adapters[name].dense()
            expected = pack(wanted.astype(np.float32), "IQ2_XXS", values)
            assert (found[name].data.reshape(-1) == expected).mean() > 0.999
    (tmp_path / "imatrix.dat").write_bytes(old[:50])
    with pytest.raises(FormatError, match="is no importance matrix"):
        merge(wide, lora, tmp_path / "x.gguf", outtype="iq2_xxs", imatrix=tmp_path / "imatrix.dat")
    with pytest.raises(ArgumentError, match="outtype 'q9' is no type of GGUF; there are F32"):
        merge(wide, lora, tmp_path / "x.gguf", outtype="q9")


def test_without_llama_cpps_library_k_types_are_refused_with_the_install_line(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorastack.merging.packing._library", lambda: None)
    assert "pip install 'lorastack[llama]'" in (packable("Q4_K") or "")
    with pytest.raises(
        UnsupportedError, match=r"6 problems\n.*pip install 'lorastack\[llama\]', or choose another type"
    ):
        merge(packed, adapter(1.0), tmp_path / "out.gguf")
    merge(packed, adapter(1.0), tmp_path / "out.gguf", outtype="q8_0")


# ---- several files


def split(path: Path, source: Path, most: int) -> list[Path]:
    """The model in several files, as llama-gguf-split makes them, by gguf's own writer."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


def test_split_bases_are_read_joined_and_written(wide: Path, llama_cpp: object, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    parts = split(tmp_path / "base/big.gguf", wide, 5)
    assert len(parts) > 2
    lora = adapter(1.0, ("attn_q",))
    merge(wide, lora, tmp_path / "whole.gguf")
    done = merge(tmp_path / "base", lora, tmp_path / "joined.gguf", verify=True)
    assert done.tensors == len(tensors(wide))
    merge(parts[1], lora, tmp_path / "several", link=True)
    written = sorted((tmp_path / "several").glob("*.gguf"))
    assert [path.name for path in written] == [path.name for path in parts]
    whole, joined = tensors(tmp_path / "whole.gguf"), tensors(tmp_path / "joined.gguf")
    again = {name: tensor for path in written for name, tensor in tensors(path).items()}
    assert set(whole) == set(joined) == set(again)
    for name, tensor in whole.items():
        assert tensor.data.tobytes() == joined[name].data.tobytes() == again[name].data.tobytes()
    assert not [key for key in fields(tmp_path / "joined.gguf") if key.startswith("split.")]
    untouched = [n for n, path in enumerate(parts) if n and not set(tensors(path)) & set(lora.adapters)]
    assert untouched
    assert all(written[n].stat().st_ino == parts[n].stat().st_ino for n in untouched)
    tokens = [1, 300, 301]
    expected = llama_cpp_logits(tmp_path / "whole.gguf", [], tokens)
    np.testing.assert_array_equal(llama_cpp_logits(tmp_path / "joined.gguf", [], tokens), expected)
    np.testing.assert_array_equal(llama_cpp_logits(written[0], [], tokens), expected)
    parts[1].unlink()
    with pytest.raises(FormatError, match=r"big-00002-of-.*there is no such file"):
        open_base(parts[0])
