"""Merged folders: numbers rounded once, bytes that stay, what is carried along, and what is refused with a word."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from lorastack import LoadedLora, LoraStack, load, merge
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, FormatError, LoraStackError, NamingError, NonFiniteError, UnsupportedError
from lorastack.files import OutputError
from lorastack.torch import attach
from tests.merge.stacks import Q, adapters
from tests.merge.test_against_peft import loaded
from tests.torch.families import FAMILIES, adapter_for, folder_of, linear_weights, logits, made
from tests.torch.test_experts import mixtral, run, saved
from tests.torch.tiny import GROUPED, far

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NUMPY = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def llama(folder: Path, kind: str = "F32", shard: str = "20KB", **config: Any) -> Path:
    """A random llama in shards."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **config)).to(TYPES[kind])
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("model*.safetensors")) for key, value in load_file(file).items()}


def dense(base: Path, stack: LoraStack, name: str) -> np.ndarray:
    """The sum in float64, by the plain formula."""
    total = everything(base)[name].to(torch.float64).numpy()
    for scale, delta in stack.terms(name):
        total = total + scale * delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))
    return total


# ---- numbers


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_the_sum_is_rounded_once(kind: str, exact: bool, tmp_path: Path) -> None:
    base, stack = llama(tmp_path / "base", kind), adapters(3)
    done = merge(base, stack, tmp_path / "out", exact=exact, verify=True)
    assert {one.kind for one in done.survivals} == {kind}
    after = everything(tmp_path / "out")
    for name in stack.weights:
        wanted = dense(base, stack, name)
        found = after[name].to(torch.float64).numpy()
        near = wanted.astype(NUMPY[kind])  # float64 rounds through float32 on the way to bfloat16: nearly always right
        same = (found == near.astype(np.float64)).mean()
        assert same > (0.999 if exact or kind != "F32" else 0.2), same
        up = np.nextafter(near, NUMPY[kind](np.inf)).astype(np.float64)
        down = np.nextafter(near, NUMPY[kind](-np.inf)).astype(np.float64)
        slack = 0 if exact else 1e-6 * np.abs(wanted).max()
        assert (np.abs(found - wanted) <= np.minimum(np.abs(up - wanted), np.abs(down - wanted)) + slack).all()


def test_merged_together_they_lose_less_than_one_after_another(tmp_path: Path) -> None:
    base, stack = llama(tmp_path / "base", "BF16", hidden_act="silu"), adapters(4, 1e-4)
    wanted = dense(base, stack, Q) - everything(base)[Q].to(torch.float64).numpy()

    def lost(folder: Path) -> float:
        moved = (everything(folder)[Q].to(torch.float64) - everything(base)[Q].to(torch.float64)).numpy()
        return float(np.linalg.norm(moved - wanted) / np.linalg.norm(wanted))

    done = merge(base, stack, tmp_path / "together")
    before = base
    for n, (lora, scale) in enumerate(stack.entries):
        merge(before, LoraStack([(lora, scale)]), tmp_path / f"one{n}")
        before = tmp_path / f"one{n}"
    assert lost(tmp_path / "together") < 0.8 * lost(before)
    said = next(one for one in done.survivals if one.weight == Q)
    assert said.error == pytest.approx(lost(tmp_path / "together"), rel=0.05)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_stochastic_rounding_keeps_the_mean_and_follows_the_seed(kind: str, tmp_path: Path) -> None:
    base, stack = llama(tmp_path / "base", kind), adapters(1, 3e-5)
    wanted = dense(base, stack, Q)
    runs = []
    for seed in range(40):
        merge(base, stack, tmp_path / f"s{seed}", round="stochastic", seed=seed)
        runs.append(everything(tmp_path / f"s{seed}")[Q].to(torch.float64).numpy())
    merge(base, stack, tmp_path / "again", round="stochastic", seed=0)
    assert np.array_equal(everything(tmp_path / "again")[Q].to(torch.float64).numpy(), runs[0])
    merge(base, stack, tmp_path / "nearest")
    nearest = everything(tmp_path / "nearest")[Q].to(torch.float64).numpy()
    assert np.linalg.norm(np.mean(runs, 0) - wanted) < 0.4 * np.linalg.norm(nearest - wanted)
    with pytest.raises(ArgumentError, match="round is 'up', expected nearest or stochastic"):
        merge(base, stack, tmp_path / "x", round="up")


def test_a_sum_that_the_type_does_not_hold_and_nan_are_refused_by_name(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", "F16")
    with pytest.raises(FormatError, match=f"weight {Q}: the sum is NaN or more than F16 holds"):
        merge(base, LoraStack([(lora, 1e7) for lora, _ in adapters(1).entries]), tmp_path / "out")
    bad = np.ones((1, 32), np.float32)
    bad[0, 3] = np.nan
    lora = LoadedLora.from_tensors({Q: (bad, np.ones((32, 1), np.float32))}, name="bad", naming="hf")
    with pytest.raises(NonFiniteError, match="1 of 32 values are NaN or Inf"):
        merge(base, lora, tmp_path / "out")
    done = merge(base, LoraStack([(lora, 0.0)]), tmp_path / "out")  # at 0 it does nothing, and is not read
    assert done.changed == 0
    assert not (tmp_path / "out/model.safetensors").exists()
    assert everything(tmp_path / "out").keys() == everything(base).keys()


# ---- bytes


def test_what_does_not_change_stays_to_the_byte_and_can_be_linked(tmp_path: Path) -> None:
    base, stack = llama(tmp_path / "base", "BF16", "10KB"), adapters()
    (base / "tokenizer.model").write_bytes(b"\x00words")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")
    for old in ("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", ".git/config"):
        (base / old).parent.mkdir(exist_ok=True)
        (base / old).write_bytes(b"old weights")
    (base / "README.md").write_text("the base's own card")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    done = merge(base, stack, tmp_path / "out", link=True, verify=True)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    old, new = everything(base), everything(tmp_path / "out")
    for name, tensor in old.items():
        if not name.startswith("model.") and name != "lm_head.weight":
            continue
        assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)) is (name not in stack.weights), name
    links, shards = 0, sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        there = tmp_path / "out" / shard.name
        changed = bool(set(load_file(shard)) & set(stack.weights))
        assert there.samefile(shard) is not changed
        links += not changed
        if changed:
            length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
            assert there.read_bytes()[:length] == shard.read_bytes()[:length]
    assert links
    assert done.written < done.size
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.model", "1_Pooling/config.json", "README.md", "lorastack_merge.toml"} <= names
    assert not [name for name in names if "consolidated" in name or name.endswith(".bin") or ".git" in name]
    assert {path.name for path in done.left_out} == {
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
    }
    text = (tmp_path / "out/README.md").read_text()
    assert "| a0 | 0.7 |" in text
    assert "| BF16 | 2 |" in text
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_force_replaces_what_a_merge_wrote_and_nothing_else(tmp_path: Path) -> None:
    base, out = llama(tmp_path / "base"), tmp_path / "out"
    merge(base, adapters(1), out)
    first = everything(out)[Q]
    with pytest.raises(ArgumentError, match="out exists; choose another name, or pass force=True"):
        merge(base, adapters(2), out)
    merge(base, adapters(2), out, force=True)
    assert not torch.equal(everything(out)[Q], first)
    (out / "wedding.jpg").write_text("precious")
    with pytest.raises(ArgumentError, match=r"holds more than an adapter \('wedding.jpg'\), and is not replaced"):
        merge(base, adapters(1), out, force=True)
    with pytest.raises(ArgumentError, match="is not replaced"):
        merge(base, adapters(1), base, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", "BF16")
    dry = merge(base, adapters(), tmp_path / "out", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    done = merge(base, adapters(), tmp_path / "out")
    assert (dry.out, dry.survivals, dry.size) == (None, done.survivals, done.size)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert done.size <= written < done.size + 5000  # and the card and the recipe


def test_a_method_is_baked_first(tmp_path: Path) -> None:
    base, stack = llama(tmp_path / "base"), adapters()
    for options in (
        {"rank": 2},
        {"method": "ties@dense", "rank": 4},
        {"method": "dare@knots", "energy": 0.9, "seed": 3},
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        merge(base, stack, out, **options)
        baked = LoraStack([(stack.bake(base, **options), 1.0)])
        np.testing.assert_allclose(everything(out)[Q].numpy(), dense(base, baked, Q), atol=1e-6)
        assert (
            f'"{options["method"]}"' if "method" in options else '"svd"' in (out / "lorastack_merge.toml").read_text()
        )


# ---- names and layouts


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("t5", "vit", "whisper", "mamba", "bert")])
def test_families_under_their_names_in_files_give_the_live_stack(name: str, tmp_path: Path) -> None:
    model = made(name)
    base = folder_of(model, tmp_path / "base")
    weights = {
        key: shape
        for ending in ("q_proj", "down_proj", "fc2", "gate", "c_attn")
        for key, shape in linear_weights(model, ending).items()
    } or {"transformer.h.0.attn.c_attn.weight": (96, 32), "transformer.h.1.mlp.c_proj.weight": (32, 128)}
    lora = adapter_for(weights)
    merge(base, lora, tmp_path / "out", verify=True)
    with attach(model, lora):
        live = logits(model)
    merged = loaded(name, model, tmp_path / "out")
    assert far(logits(merged), live) < 1e-5
    assert far(logits(model), live) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_one_by_one_in_files_and_fused_live(family: str, tmp_path: Path) -> None:
    model = mixtral() if family == "mixtral" else made(family)
    base = folder_of(model, tmp_path / "base")
    assert any(".experts.0." in name for name in everything(base))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    loras = [load(saved(model, tmp_path / f"a{n}", parameters, n)) for n in (1, 2)]
    stack = LoraStack([(loras[0], 0.6), (loras[1], -0.3)])
    merge(base, stack, tmp_path / "out", verify=True)
    with attach(model, stack):
        live = run(model)
    assert far(run(loaded(family, model, tmp_path / "out")), live) < 1e-5
    single = "model.layers.0.mlp.experts.1.gate_proj.weight"
    if family == "qwen3_moe":  # and an adapter that names experts one by one
        lora = adapter_for({single: (24, 32)})
        merge(base, lora, tmp_path / "single")
        wanted = dense(base, LoraStack([(lora, 1.0)]), single)
        np.testing.assert_allclose(everything(tmp_path / "single")[single].numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_parameter_of_the_files(turned: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    w = rng.standard_normal((3, 8, 8)).astype(np.float32)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: torch.from_numpy(w)}, tmp_path / "base/model.safetensors")
    config = {"architectures": ["GptOssForCausalLM" if turned else "MixtralForCausalLM"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    a, b = rng.standard_normal((3, 2, 8), np.float32), rng.standard_normal((3, 8, 2), np.float32)
    lora = LoadedLora.from_tensors({name: (a, b)}, naming="hf")
    merge(tmp_path / "base", lora, tmp_path / "out")
    delta = b @ a
    found = everything(tmp_path / "out")[name].numpy()
    np.testing.assert_allclose(found, w + (delta.swapaxes(1, 2) if turned else delta), atol=1e-5)


def test_gpt2_files_without_a_prefix(tmp_path: Path) -> None:
    model = made("gpt2")
    base = folder_of(model, tmp_path / "base")
    file = base / "model.safetensors"
    save_file(
        {key.removeprefix("transformer."): value for key, value in load_file(file).items()}, file, {"format": "pt"}
    )
    lora = adapter_for({"transformer.h.0.attn.c_attn.weight": (96, 32)})
    merge(base, lora, tmp_path / "out")
    assert "h.0.attn.c_attn.weight" in everything(tmp_path / "out")
    with attach(model, lora):
        live = logits(model)
    fresh = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert far(logits(fresh), live) < 1e-5


# ---- what is refused


def test_an_adapter_for_another_base_is_one_line_then_at_most_ten(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    factors = {
        f"model.layers.{n}.attn.q.weight": (np.ones((1, 9), np.float32), np.ones((9, 1), np.float32)) for n in range(40)
    }
    with pytest.raises(NamingError) as found:
        merge(base, LoadedLora.from_tensors(factors, name="other", naming="hf"), tmp_path / "out")
    lines = str(found.value).splitlines()
    assert len(lines) == 13
    assert "0 of 40 weights fit; the base is a LlamaForCausalLM" in lines[1]
    assert lines[-1].endswith("and 30 more")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_bases_say_what_to_do(method: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=r"is quantised \(\w+\).*merge into the model it was made from, and quant"
    ):
        merge(base, adapters(), tmp_path / "out")


def test_numbers_of_eight_bits_without_scales_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    lora = LoadedLora.from_tensors({"w.weight": (np.ones((1, 4)), np.ones((4, 1)))})
    with pytest.raises(UnsupportedError, match=r"w.weight is stored as F8_E4M3; merge into the model it was made from"):
        merge(tmp_path / "base", lora, tmp_path / "out")


def test_nothing_is_written_into_the_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "out").symlink_to(base / "inside")
    (base / "sub").mkdir()
    for out in (base / "new", tmp_path / "link/new", base / "sub/new"):
        with pytest.raises(ArgumentError, match="the base, which is never changed"):
            merge(base, adapters(), out)
        with pytest.raises(ArgumentError, match="the base, which is never changed"):
            merge(tmp_path / "link", adapters(), out)
    for out in (base, tmp_path / "link", tmp_path / "out"):
        for force in (False, True):
            with pytest.raises(ArgumentError):
                merge(base, adapters(), out, force=force)
    assert not (base / "inside").exists()
    assert not (base / "new").exists()


def test_damaged_bases_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    whole = llama(tmp_path / "base")
    shard = sorted(whole.glob("model-*.safetensors"))[1].name

    def broken(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    (broken("missing") / shard).unlink()
    with pytest.raises(FormatError, match="weights of its index are in no file"):
        merge(tmp_path / "missing", adapters(), tmp_path / "out")
    short = broken("short") / shard
    os.truncate(short, short.stat().st_size - 100)
    with pytest.raises(FormatError, match=rf"(?s){shard}.*cut short"):
        merge(tmp_path / "short", adapters(), tmp_path / "out")
    os.truncate(broken("empty") / shard, 0)
    with pytest.raises(FormatError, match=f"{shard}: it is empty"):
        merge(tmp_path / "empty", adapters(), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_too_little_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"it needs \d+\.\d KiB, .* has 1000 bytes free; nothing was written"):
        merge(base, adapters(), tmp_path / "out")


def test_two_adapters_that_replace_the_same_are_not_merged(tmp_path: Path) -> None:
    from dataclasses import replace

    base = llama(tmp_path / "base")
    head = {"modules_to_save": {"lm_head.weight": Factor.of(np.ones((64, 32), np.float32), "head")}}
    one, two = (replace(lora, extras=head) for lora, _ in adapters(2).entries)
    with pytest.raises(NamingError, match=r"a0 and a1 both replace weight lm_head\.weight; merge only one"):
        merge(base, LoraStack([(one, 1.0), (two, 1.0)]), tmp_path / "out")
    merge(base, LoraStack([(one, 1.0), (two, 0.0)]), tmp_path / "out", verify=True)
    assert (everything(tmp_path / "out")["lm_head.weight"] == 1).all()


def test_verify_finds_bytes_that_another_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorastack.merging import folder as written

    base = llama(tmp_path / "base", "BF16")
    find = written.Folder.find

    def damaged(self: Any, out: Path, name: str) -> Any:
        for file in out.glob("*.safetensors"):
            if name in load_file(file):
                raw = bytearray(file.read_bytes())
                raw[-2000:] = bytes(2000)
                file.write_bytes(raw)
        return find(self, out, name)

    monkeypatch.setattr(written.Folder, "find", damaged)
    with pytest.raises(OutputError, match=r"what was written is not what was to be written"):
        merge(base, adapters(2, 0.5), tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_errors_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(tmp_path / "base")
    monkeypatch.setattr(
        "lorastack.files.large.LargeFile.write", lambda self, data: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(LoraStackError, match="could not be written, nothing was changed"):
        merge(base, adapters(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl", "gpt2", "opt", "qwen2"])
def test_an_embedding_that_was_the_head_too_leaves_the_head_what_it_was(name: str, tmp_path: Path) -> None:
    model = made(name) if name != "qwen2" else FAMILIES["qwen2"](tie_word_embeddings=True).eval()
    base = folder_of(model, tmp_path / "base")
    path, module = next(
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 64
    )
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 64), np.float32), rng.standard_normal((module.embedding_dim, 3)).astype(np.float32)
    lora = LoadedLora.from_tensors({f"{path}.weight": LoraDelta(a, b, kind="embedding")}, naming="hf")
    with attach(model, lora):
        live = logits(model)
    merge(base, lora, tmp_path / "out", verify=True)
    merged = loaded(name, model, tmp_path / "out")
    assert far(logits(merged), live) < 1e-5
    assert far(logits(model), live) > 0.1
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_an_embedding_saved_along_is_compared_with_the_base(tmp_path: Path) -> None:
    from dataclasses import replace

    base, (lora, _) = llama(tmp_path / "base"), adapters(1).entries[0]
    own = everything(base)["model.embed_tokens.weight"].numpy()
    other = own.copy()
    other[40, 7] += 0.5
    for saved_along, fits in ((own, True), (other, False)):
        extras = {"base_weight": {"model.embed_tokens.weight": Factor.of(saved_along, "saved")}}
        if fits:
            done = merge(base, replace(lora, extras=extras), tmp_path / "out")
            assert done.changed == 2
            continue
        with pytest.raises(NamingError, match=r"differs from the model.s \[64, 32\]: the adapter was trained"):
            merge(base, replace(lora, extras=extras), tmp_path / "other")


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    base = llama(tmp_path / "base")
    done = merge(base, adapters(), tmp_path / "out", verify=True, progress=lambda *said: seen.append(said))
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["estimating", "writing", "verifying"]
    written = [(count, total) for what, count, total in seen if what == "writing"]
    assert written == sorted(written)
    assert written[-1][1] == done.size
    assert written[-1][0] > 0.9 * done.size
