"""Recipes and other small inputs that anyone may have written: bounded before work, never a raw error."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, load, save
from lorastack.base import convert_names, open_base
from lorastack.cli.apply import _read_array
from lorastack.cli.run import parse_rows
from lorastack.errors import ArgumentError, FormatError, LoraStackError
from lorastack.files import regular
from lorastack.formats.provenance import sources_of
from lorastack.hub import resolve
from lorastack.recipe import MAX_DEPTH, Recipe, load_stack
from lorastack.recipe_text import MAX_PARTS, values_of

ADAPTER = '[[adapter]]\nsource="x"\n'


def chain(folder: Path, length: int, times: int = 1) -> str:
    """Recipes that each hold the next ``times`` times; the first one."""
    for n in range(length):
        (folder / f"r{n}.toml").write_text(f'[[adapter]]\nsource="r{n + 1}.toml"\n' * times)
    (folder / f"r{length}.toml").write_text(ADAPTER)
    return str(folder / "r0.toml")


def test_recipes_lie_within_each_other_to_a_depth(tmp_path: Path) -> None:
    assert len(Recipe.of_words([chain(tmp_path, MAX_DEPTH - 1)]).ingredients) == 1
    for length in (MAX_DEPTH, 1200):
        with pytest.raises(ArgumentError, match="within each other more than 16 deep"):
            Recipe.of_words([chain(tmp_path, length)])


def test_what_recipes_make_is_counted_before_it_is_made(tmp_path: Path) -> None:
    assert len(Recipe.of_words([chain(tmp_path, 12, 2)]).ingredients) == 1 << 12
    for length, times in ((14, 2), (15, 2), (3, 100), (5, 1000)):
        start = time.thread_time()
        with pytest.raises(ArgumentError, match="make more than 10,000 adapters"):
            Recipe.of_words([chain(tmp_path, length, times)])
        assert time.thread_time() - start < 3
    steps = "steps=[" + '{select="*"},' * 5000 + "]\n"
    (tmp_path / "many.toml").write_text(ADAPTER * 100)
    (tmp_path / "steps.toml").write_text('[[adapter]]\nsource="many.toml"\n' + steps)
    with pytest.raises(ArgumentError, match="100,000 steps"):
        Recipe.of_words([str(tmp_path / "steps.toml")])


def test_scales_that_multiply_beyond_all_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(ADAPTER + "scale=1e200")
    (tmp_path / "b.toml").write_text('[[adapter]]\nsource="a.toml"\nscale=1e200')
    with pytest.raises(ArgumentError, match=r"x gets the scale 1e\+200 \* 1e\+200, too large"):
        Recipe.of_words([str(tmp_path / "b.toml")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a=" + "[" * 100_000, "nested too deep"),
        ("a=" + "{a=" * 5_000, "nested too deep"),
        (ADAPTER + "scale=" + "1" * 5000, "no TOML: Exceeds the limit"),
        ("a" + ".a" * 30_000 + "=1", "a key of it has 30,001 parts"),
        ("[a" + ".a" * 30_000 + "]", "a key of it has 30,001 parts"),
        ('"a"' + '."a"' * 30_000 + "=1", "a key of it has 30,001 parts"),
        ("'a'" + " . 'a'" * 30_000 + "=1", "a key of it has 30,001 parts"),
        ('x={a="""a"""", b' + ".b" * 30_000 + '="c"}', "a key of it has 30,001 parts"),
        ("x = '''a''''\ny" + ".y" * 30_000 + "=1", "a key of it has 30,001 parts"),
        ("# it's \"\na" + ".a" * 30_000 + "=1", "a key of it has 30,001 parts"),
        ("a=1" * 400_000, "at most 1,048,576 are read"),
        (ADAPTER + 'select="re:a{99999999999999999999}"', "has no meaning"),
        (ADAPTER + 'select="re:' + "(" * 20000 + ")" * 20000 + '"', "has no meaning"),
        (ADAPTER + f"steps=[{'[' * 200}{']' * 200}]", "has no meaning"),
    ],
)
def test_a_text_that_takes_more_than_it_holds_is_refused(text: str, said: str) -> None:
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(ArgumentError, match=said) as caught:
        Recipe.parse(text, "x.toml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20
    assert time.thread_time() - start < 5
    assert len(str(caught.value)) < 4000


def test_dots_in_texts_and_numbers_are_no_keys() -> None:
    dots = "." * (MAX_PARTS * 3)
    numbers = ", ".join(f'"w.{n}"=0.5' for n in range(300))
    text = f"[[adapter]]\nsource=\"x{dots}\"\nscales={{{numbers}}}\nname='''{dots}'''\n# {dots}\n"
    assert len(values_of(text, "x")["adapter"][0]["scales"]) == 300


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
def test_inputs_that_are_no_regular_files_are_refused(tmp_path: Path) -> None:
    def pipe(name: str) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    with (tmp_path / "sparse.toml").open("wb") as file:
        file.truncate(2 << 30)
    for refused, said in (
        (lambda: load(pipe("x.gguf")), "it is a pipe"),
        (lambda: load(pipe("r.toml")), "it is a pipe"),
        (lambda: load(tmp_path / "zero.toml"), "it is a device"),
        (lambda: load(tmp_path / "sparse.toml"), "at most 1,048,576 are read"),
        (lambda: load(tmp_path), "it has no adapter_config"),
        (lambda: open_base(pipe("base/config.json").parent), "it is a pipe"),
        (lambda: open_base(pipe("base.gguf")), "it is a pipe"),
        (lambda: parse_rows(str(pipe("rows.jsonl"))), "it is a pipe"),
        (lambda: _read_array(pipe("x.npy")), "it is a pipe"),
        (lambda: load("/proc/self/mem"), "cannot be read|it is empty"),
        (lambda: load("/dev/null"), "it is a device"),
    ):
        with pytest.raises(LoraStackError, match=said):
            refused()


@pytest.mark.parametrize(
    "name", ["a" * 300, "a" * 5000, "~nosuchuser/x", "a\0b", "\udcff", "x/" * 3000, "", "a" * 5000 + ":0.5"]
)
def test_names_that_no_file_can_have(name: str) -> None:
    for call in (load, open_base, lambda word: load_stack([word]), lambda word: load(f"{word}.toml")):
        with pytest.raises(LoraStackError) as caught:
            call(name)
        assert len(str(caught.value)) < 14_000


def test_a_folder_is_looked_through_to_a_depth_and_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a/b/c/d/e/f"
    deep.mkdir(parents=True)
    for folder in (deep, tmp_path / "a/b", tmp_path / "a/b/c"):
        (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "a/ring").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="holds several adapters") as caught:
        load(tmp_path)
    assert caught.value.problems == (str(tmp_path / "a/b"), str(tmp_path / "a/b/c"))
    monkeypatch.setattr(regular, "MAX_ENTRIES", 1)
    with pytest.raises(FormatError, match=r"it has no adapter_config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("revision", ["pr/../../x", "..", "a/./b", "a//b", "a/.."])
def test_a_revision_does_not_lead_out_of_the_cache(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("was asked"))
    with pytest.raises(FormatError):
        resolve(f"o/n@{revision}")


def base_of(folder: Path, config: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    weight = "model.layers.0.self_attn.q_proj.weight"
    pair = (np.ones((4, 6), np.float32), np.ones((5, 4), np.float32))
    made = save(LoadedLora.from_tensors({weight: pair}, naming="hf"), folder / "made", recipe=False)
    (made / "adapter_model.safetensors").rename(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"architectures": 5}', "architectures is 5, expected a list of names"),
        ('{"architectures": [{}], "model_type": [], "text_config": 3}', "3 problems"),
        ('{"text_config": {"model_type": {}}}', "text_config.model_type is {}, expected a name"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_base_with_a_damaged_configuration(tmp_path: Path, config: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        open_base(base_of(tmp_path / "b", config))


@pytest.mark.parametrize("layers", ["1000000000", "1001", "true", "-1", '"2"', "1.5"])
def test_a_base_says_a_number_of_layers(tmp_path: Path, layers: str) -> None:
    base = open_base(base_of(tmp_path / "b", f'{{"num_hidden_layers": {layers}}}'))
    with pytest.raises(FormatError, match=r"num_hidden_layers = .*, expected 1 to 1,000"):
        _ = base.layers


@pytest.mark.parametrize(("heads", "fits"), [(1, True), (2, True), (3, False), (8, False)])
def test_heads_divide_the_rows(tmp_path: Path, heads: int, fits: bool) -> None:
    config = f'{{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": {heads}}}'
    base = open_base(base_of(tmp_path / "b", config))
    rows = {**base.shapes, "model.layers.0.self_attn.q_proj.weight": (8, 6)}
    object.__setattr__(base, "shapes", rows)
    pair = (np.ones((4, 6), np.float32), np.ones((8, 4), np.float32))
    lora = LoadedLora.from_tensors({"blk.0.attn_q.weight": pair}, naming="gguf")
    if fits:
        convert_names(lora, base, "hf").check()
    else:
        with pytest.raises(LoraStackError, match=f"its 8 rows are no {heads} heads of two halves"):
            convert_names(lora, base, "hf")


def test_sources_are_what_an_adapter_was_made_of(tmp_path: Path) -> None:
    pair = (np.ones((4, 6), np.float32), np.ones((5, 4), np.float32))
    one = save(LoadedLora.from_tensors({"model.layers.0.mlp.up_proj.weight": pair}, naming="hf"), tmp_path / "one")
    assert sources_of(load_stack([str(one), f"{one}:0.5"]).bake()) == [one]
