"""Adapters that are hardly for one base stop a bake, a comparison, a page, unless a base or the caller settles it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorastack import LoadedLora, LoraStack, load
from lorastack.algebra.compare import compare
from lorastack.base.together import base_key
from lorastack.errors import NamingError
from lorastack.report import report
from tests.test_cli import Command, lorastack  # noqa: F401

FALCON = [f"transformer.h.{n}.self_attention.query_key_value" for n in range(2)]
BERT = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(3)]
FALCON_MLP = [f"transformer.h.{n}.mlp.dense_h_to_4h" for n in range(2)]


def peft(folder: Path, base: str | None, modules: list[str], seed: int = 0) -> Path:
    """A folder as PEFT writes it."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    arrays = {}
    for module in modules:
        arrays[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((2, 6)).astype(np.float32)
        arrays[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((5, 2)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": modules, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def gguf_adapter(file: Path, architecture: str, weights: list[str], repository: str | None = None) -> Path:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    if repository:
        writer.add_string("general.base_model.0.repo_url", repository)
    for weight in weights:
        writer.add_tensor(f"{weight}.lora_a", rng.standard_normal((2, 6)).astype(np.float32))
        writer.add_tensor(f"{weight}.lora_b", rng.standard_normal((5, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stack_of(*paths: Path) -> LoraStack:
    return LoraStack([(load(path), 1.0) for path in paths])


VERBS: dict[str, Callable[..., Any]] = {
    "bake": lambda stack, folder, **options: stack.bake(**options),
    "compare": lambda stack, folder, **options: compare(stack, **options),
    "report": lambda stack, folder, **options: report(stack, folder / "page.html", force=True, **options),
}


@pytest.mark.parametrize("verb", VERBS)
def test_different_bases_are_listed_with_the_ways_out(tmp_path: Path, verb: str) -> None:
    stack = stack_of(
        peft(tmp_path / "falcon", "tiiuae/falcon-7b", FALCON),
        peft(tmp_path / "bert", "google-bert/bert-base-cased", BERT),
        peft(tmp_path / "silent", None, BERT),
    )
    with pytest.raises(NamingError) as caught:
        VERBS[verb](stack, tmp_path)
    first = str(caught.value).splitlines()[0]
    assert first == (
        "the adapters name different bases, so they are hardly for one model; give the base they are for as base=..., "
        "or let them be with allow_mixed_bases=True"
    )
    assert caught.value.problems == (
        f"falcon: base tiiuae/falcon-7b; 2 weights such as {FALCON[0]}.weight",
        f"bert: base google-bert/bert-base-cased; 3 weights such as {BERT[0]}.weight",
        f"silent: no base named; 3 weights such as {BERT[0]}.weight",
    )
    VERBS[verb](stack, tmp_path, allow_mixed_bases=True)


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_weights_of_bases_named_differently_are_refused_too(tmp_path: Path, verb: str) -> None:
    stack = stack_of(peft(tmp_path / "a", "org/falcon-7b", FALCON), peft(tmp_path / "b", "org/falcon-40b", FALCON, 1))
    with pytest.raises(NamingError, match=r"different bases(.|\n)*falcon-7b(.|\n)*falcon-40b"):
        VERBS[verb](stack, tmp_path)


@pytest.mark.parametrize("bases", [(None, None), ("org/falcon-7b", None)])
def test_no_weight_in_common_is_refused_where_names_do_not_settle_it(tmp_path: Path, bases: Any) -> None:
    stack = stack_of(peft(tmp_path / "a", bases[0], FALCON), peft(tmp_path / "b", bases[1], BERT))
    with pytest.raises(NamingError, match="the adapters share no weight, so they are hardly for one model"):
        stack.bake()
    more = stack_of(tmp_path / "a", tmp_path / "b", peft(tmp_path / "c", None, FALCON, 1))
    with pytest.raises(NamingError, match="share no weight between 2 groups of them"):
        more.bake()


SAME = [
    ("tiiuae/falcon-7b", "tiiuae/falcon-7b"),
    ("tiiuae/falcon-7b", "tiiuae/Falcon-7B"),
    ("tiiuae/falcon-7b", "/data/models/falcon-7b/"),
    ("tiiuae/falcon-7b", "D:\\models\\falcon-7b"),
    ("tiiuae/falcon-7b", "falcon-7b@main"),
    ("tiiuae/falcon-7b", "unsloth/falcon-7b-bnb-4bit"),
    ("tiiuae/falcon-7b", "unsloth/falcon-7b-unsloth-bnb-4bit"),
    ("tiiuae/falcon-7b", "TheBloke/falcon-7b-GPTQ"),
    ("tiiuae/falcon-7b", "/root/.cache/huggingface/hub/models--tiiuae--falcon-7b/snapshots/0a1b2c"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_base_by_two_names_is_one_base(tmp_path: Path, one: str, other: str) -> None:
    """Also where the adapters change different parts of it."""
    stack = stack_of(peft(tmp_path / "a", one, FALCON), peft(tmp_path / "b", other, FALCON_MLP))
    assert stack.bake().num_adapters() == 4
    assert compare(stack).cosine[0, 1] == 0


@pytest.mark.parametrize("name", ["org/falcon-7b-instruct", "org/falcon-7b-v2", "org/4bit", "org/falcon-7", "falcon"])
def test_another_base_is_not_taken_for_it(name: str) -> None:
    assert base_key(name) != base_key("tiiuae/falcon-7b")


def test_an_adapter_that_names_no_base_goes_with_what_shares_its_weights(tmp_path: Path) -> None:
    stack = stack_of(peft(tmp_path / "a", "org/falcon-7b", FALCON), peft(tmp_path / "b", None, FALCON[:1]))
    assert stack.bake().num_adapters() == 2


def test_views_of_one_file_are_for_one_base(tmp_path: Path) -> None:
    lora = load(peft(tmp_path / "a", None, FALCON))
    parts = [(lora.select(f"transformer.h.{n}.*"), 0.5 + n) for n in range(2)]
    assert LoraStack(parts).bake().num_adapters() == 2


def test_gguf_adapters_of_one_architecture_go_together_and_of_two_do_not(tmp_path: Path) -> None:
    q = gguf_adapter(tmp_path / "q.gguf", "phi2", ["blk.0.attn_q.weight"])
    up = gguf_adapter(tmp_path / "up.gguf", "phi2", ["blk.0.ffn_up.weight"])
    other = gguf_adapter(tmp_path / "other.gguf", "mamba", ["blk.0.attn_q.weight"])
    assert stack_of(q, up).bake().num_adapters() == 2
    with pytest.raises(NamingError, match=r"different architectures(.|\n)*q: .* phi2(.|\n)*architecture mamba"):
        stack_of(q, other).bake()
    sized = [
        gguf_adapter(tmp_path / f"{size}.gguf", "phi2", ["blk.0.attn_q.weight"], f"https://hf.co/org/phi-{size}")
        for size in ("small", "large")
    ]
    with pytest.raises(NamingError, match=r"different bases(.|\n)*base https://hf.co/org/phi-large"):
        stack_of(*sized).bake()


def in_memory(*names: str, base: str | None = None) -> LoadedLora:
    lora = LoadedLora.from_tensors({name: (np.ones((1, 3)), np.ones((2, 1))) for name in names}, naming="hf")
    return replace(lora, metadata={"base_model_name_or_path": base}) if base else lora


def test_in_memory_names_of_numbered_layers_tell_models_apart() -> None:
    ours, mlp = in_memory("gpt_neox.layers.0.attention.dense.weight"), in_memory("gpt_neox.layers.1.mlp.dense.weight")
    other = in_memory("rwkv.blocks.0.attention.key.weight")
    free = in_memory("anything")
    assert LoraStack([(ours, 1.0), (mlp, 1.0), (free, 1.0)]).bake().num_adapters() == 3
    with pytest.raises(NamingError, match="share no weight"):
        LoraStack([(ours, 1.0), (other, 1.0)]).bake()
    with pytest.raises(NamingError, match="different bases"):
        LoraStack([(in_memory("a", base="org/one"), 1.0), (in_memory("a", base="org/two"), 1.0)]).bake()


COMMANDS = [
    ["bake", "falcon", "bert", "-o", "out"],
    ["bake", "falcon:0.5", "bert:0.5", "--rank", "1", "-o", "out"],
    ["compare", "falcon", "bert", "--json"],
    ["report", "falcon", "bert", "-o", "page.html"],
    ["resize", "both.toml", "--rank", "1", "-o", "out"],
    ["apply", "falcon", "bert", "-t", f"{FALCON[0]}.weight", "-i", "x.npy", "-o", "y.npy"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_with_a_stack_stops_and_names_its_flags(
    lorastack: Command,  # noqa: F811
    words: list[str],
) -> None:
    peft(lorastack.folder / "falcon", "tiiuae/falcon-7b", FALCON)
    peft(lorastack.folder / "bert", "google-bert/bert-base-cased", BERT)
    tables = "".join(f'[[adapter]]\nsource = "{name}"\n' for name in ("falcon", "bert"))
    (lorastack.folder / "both.toml").write_text(tables)
    np.save(lorastack.folder / "x.npy", np.ones(6, np.float32))
    said = lorastack.fails(*words)
    assert "the adapters name different bases" in said
    assert "give the base they are for with --base, or let them be with --allow-mixed-bases" in said
    assert "falcon: base tiiuae/falcon-7b; 2 weights" in said
    assert "bert: base google-bert/bert-base-cased; 3 weights" in said
    lorastack.works(*words, "--allow-mixed-bases")


def base_of(folder: Path, modules: list[str]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}))
    save_file({f"{m}.weight": np.ones((5, 6), np.float32) for m in modules}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("command", ["bake", "compare", "apply"])
def test_a_base_settles_it_where_each_fits(lorastack: Command, command: str) -> None:  # noqa: F811
    base_of(lorastack.folder / "model", FALCON)
    peft(lorastack.folder / "a", "org/falcon-7b", FALCON)
    peft(lorastack.folder / "b", "org/falcon-7b-instruct", FALCON, 1)
    peft(lorastack.folder / "bert", "google-bert/bert-base-cased", BERT)
    np.save(lorastack.folder / "x.npy", np.ones(6, np.float32))
    more = {
        "bake": ["-o", "out"],
        "compare": ["--no-intruders"],
        "apply": ["-t", f"{FALCON[0]}.weight", "-i", "x.npy", "-o", "y.npy"],
    }[command]
    said = lorastack.fails(command, "a", "bert", *more, "--base", "model")
    assert f"weight {BERT[0]}.weight is none of the base's" in said
    lorastack.works(command, "a", "b", *more, "--base", "model")
    for name in "ab":  # nor do the bases that recipes name matter then
        text = f'base = "org/{name}"\n[[adapter]]\nsource = "{name}"\n'
        (lorastack.folder / f"{name}.toml").write_text(text)
    again = ["--force"] if command != "compare" else []
    assert "the recipes name different bases: org/a, org/b" in lorastack.fails(
        command, "a.toml", "b.toml", *more, *again
    )
    lorastack.works(command, "a.toml", "b.toml", *more, *again, "--base", "model")
