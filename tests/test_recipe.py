"""Recipes: what is written is what is read, what is read is what is stacked, and what is baked can be baked again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lorastack import LoadedLora, LoraStack, convert_names, load
from lorastack.errors import ArgumentError, FormatError
from lorastack.formats.provenance import Ingredient
from lorastack.mixture import parse_spec
from lorastack.recipe import Recipe, load_stack

NAMES = [f"blk.{n}.{stem}.weight" for n in range(4) for stem in ("attn_q", "ffn_up")]


def adapter(seed: int, naming: str = "gguf") -> LoadedLora:
    rng = np.random.default_rng(seed)
    names = NAMES if naming == "gguf" else [n.replace("blk.", "model.layers.") for n in NAMES]
    tensors = {
        n: (
            rng.standard_normal((2 + seed, 6)).astype(np.float32),
            rng.standard_normal((8, 2 + seed)).astype(np.float32),
        )
        for n in names
    }
    lora = LoadedLora.from_tensors(tensors, alpha=4, naming=naming)  # type: ignore[arg-type]
    return replace(lora, metadata={"general.architecture": "llama"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.gguf and b.gguf, and the same weights as PEFT folders a and b."""
    for seed, name in enumerate("ab"):
        adapter(seed).save(tmp_path / f"{name}.gguf", recipe=False)
        adapter(seed, "hf").save(tmp_path / name, recipe=False)
    return tmp_path


def dense(lora: LoadedLora, name: str) -> np.ndarray:
    delta = lora.adapters[name]
    return delta.scaling * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))


def sums(stack: LoraStack) -> dict[str, np.ndarray]:
    """The stack's sum at every weight, which is all that a stack is."""
    return {
        name: sum(scale * dense(lora, name) for lora, scale in stack.entries if name in lora.adapters)
        for name in stack.weights
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- the text

text = st.text(min_size=1, max_size=12)
patterns = text.filter(lambda p: not p.startswith("re:")) | st.just(r"re:blk\.\d+\.attn_q\.weight")
finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.one_of(
    st.tuples(st.just("select"), patterns),
    st.tuples(st.just("scales"), st.dictionaries(patterns, finite, max_size=3)),
    st.tuples(st.just("names"), st.sampled_from(["gguf", "hf"])),
    st.tuples(st.just("without_extras"), st.lists(st.sampled_from(["dora", "bias"]), max_size=2)),
)
ingredients = st.builds(
    Ingredient,
    source=text,
    scale=finite,
    name=st.none() | text,
    steps=st.lists(steps, max_size=3).map(tuple),
    sha256=st.dictionaries(text, text, max_size=2).map(lambda d: tuple(sorted(d.items()))),
)


@given(st.builds(Recipe, st.lists(ingredients, min_size=1, max_size=3).map(tuple), st.none() | text))
def test_what_is_written_is_what_is_read(said: Recipe) -> None:
    assert Recipe.parse(said.to_toml(), "x.toml") == said


def test_the_short_forms_of_a_step_are_read_too() -> None:
    said = Recipe.parse(
        """
        base = "my-model"
        [[adapter]]
        source = "zara.gguf"
        [[adapter]]
        source = "luna"
        scale = -1
        name = "moon"
        select = "blk.[0-9].*"
        scales = { "blk.0.*" = 2, "*" = 0.5 }
        """,
        "x.toml",
    )
    steps = (("select", "blk.[0-9].*"), ("scales", {"blk.0.*": 2, "*": 0.5}))
    assert said == Recipe((Ingredient("zara.gguf"), Ingredient("luna", -1.0, "moon", steps)), "my-model")


def test_everything_that_is_wrong_is_listed() -> None:
    with pytest.raises(ArgumentError, match=r"x\.toml is no recipe: 17 problems") as caught:
        Recipe.parse(
            """
            base = 3
            adapters = []
            [[adapter]]
            scale = "much"
            weight = 0.5
            [[adapter]]
            source = "a"
            scale = nan
            name = 7
            select = 5
            scales = { "blk.0.*" = inf }
            sha256 = "abc"
            steps = [{ names = "onnx" }, "select", { without_extras = [1] }, { forget = true }]
            [[adapter]]
            source = "b"
            scale = true
            steps = 5
            select = "re:("
            """,
            "x.toml",
        )

    def steps(number: int, *said: str) -> list[str]:
        known = "has no meaning; there are lokr_rank, names, rename, scales, select, without_extras"
        return [f"adapter {number}: step {step} {known}" for step in said]

    assert list(caught.value.problems) == [
        "key 'adapters' is not known; there are base and [[adapter]]",
        "adapter 1: key 'weight' is not known; there are name, scale, scales, select, sha256, source, steps",
        "adapter 1: source is None, expected a path or hub id",
        "adapter 1: scale is 'much', expected a finite number",
        "adapter 2: scale is nan, expected a finite number",
        "adapter 2: name is 7, expected text",
        *steps(2, "select = 5", "scales = {'blk.0.*': inf}", "names = 'onnx'", "select = None"),
        *steps(2, "without_extras = [1]", "forget = True"),
        "adapter 2: sha256 is 'abc', expected file names with hashes",
        "adapter 3: scale is True, expected a finite number",
        *steps(3, "select = 're:('", "5 = None"),
        "base is 3, expected a path or hub id",
    ]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[[adapter", "x.toml: it is no TOML: "),
        ("", r"it has no \[\[adapter\]\] with a source"),
        ("adapter = 3", r"it has no \[\[adapter\]\] with a source"),
        ("adapter = []", r"it has no \[\[adapter\]\] with a source"),
        (f"[[adapter]]\nsource = 'a'\nscale = 1{'0' * 400}", "expected a finite number"),
        ("[[adapter]]\nsource = ''", "source is '', expected a path or hub id"),
    ],
)
def test_what_is_no_recipe_is_refused(said: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recipe.parse(said, "x.toml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no\.toml: there is no such file"):
        load_stack([f"{tmp_path}/no.toml"])
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ArgumentError, match=r"x\.toml: the recipe cannot be read: .*utf-8"):
        load_stack([f"{tmp_path}/x.toml:0.5"])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("zara.gguf:0.7", ("zara.gguf", 0.7)),
        ("zara.gguf", ("zara.gguf", 1.0)),
        ("./a b/zara:-1e-3", ("./a b/zara", -1e-3)),
        ("owner/name@main:2", ("owner/name@main", 2.0)),
        ("C:\\loras\\zara.gguf", ("C:\\loras\\zara.gguf", 1.0)),
        ("C:/loras/zara.gguf:0.5", ("C:/loras/zara.gguf", 0.5)),
        ("d:\\zara:0", ("d:\\zara", 0.0)),
        ("C:0.5", ("C", 0.5)),
    ],
)
def test_a_word_is_a_file_and_a_scale(word: str, expected: tuple[str, float]) -> None:
    assert parse_spec(word) == (*expected, None)


@pytest.mark.parametrize("word", ["zara:much", "zara:0.7:x", "ab:/zara", "zara:", "zara:nan", "zara:inf"])
def test_a_word_with_a_scale_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(ArgumentError, match=r"is no scale; write FILE:SCALE|a scale is a finite number"):
        parse_spec(word)


def test_a_file_with_a_colon_in_its_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zara:0.5").write_text("")
    assert parse_spec("zara:0.5") == ("zara:0.5", 1.0, None)
    assert parse_spec("zara:0.5:2") == ("zara:0.5", 2.0, None)
    Path("a=b").write_text("")
    assert parse_spec("a=b:2") == ("a=b", 2.0, None)


def test_a_name_of_ones_own_stands_in_front() -> None:
    assert parse_spec("hers=loras/zara.gguf:0.5") == ("loras/zara.gguf", 0.5, "hers")
    assert parse_spec("my style=acme/style@v1") == ("acme/style@v1", 1.0, "my style")
    assert parse_spec("./a=b/zara") == ("./a=b/zara", 1.0, None), "a path is no name"


# ---- what it means


def test_scales_by_layer_and_by_block_multiply_what_they_name(folder: Path) -> None:
    path = recipe(
        folder / "r.toml",
        r"""
        [[adapter]]
        source = "a.gguf"
        scale = 0.5
        select = "blk.[0-2].*"
        scales = { "blk.0.*" = 3.0, 're:blk\.[12]\.attn_q\.weight' = -1 }
        [[adapter]]
        source = "b.gguf"
        steps = [{ scales = { "*" = 2.0 } }, { select = "*.ffn_up.weight" }, { scales = { "blk.3.*" = 0.0 } }]
        """,
    )
    a, b = load(folder / "a.gguf"), load(folder / "b.gguf")
    expected = {
        "blk.0.attn_q.weight": 1.5 * dense(a, NAMES[0]),
        "blk.0.ffn_up.weight": 1.5 * dense(a, NAMES[1]) + 2 * dense(b, NAMES[1]),
        "blk.1.attn_q.weight": -0.5 * dense(a, NAMES[2]),
        "blk.1.ffn_up.weight": 0.5 * dense(a, NAMES[3]) + 2 * dense(b, NAMES[3]),
        "blk.2.attn_q.weight": -0.5 * dense(a, NAMES[4]),
        "blk.2.ffn_up.weight": 0.5 * dense(a, NAMES[5]) + 2 * dense(b, NAMES[5]),
        "blk.3.ffn_up.weight": 0 * dense(b, NAMES[7]),
    }
    assert_equal(sums(load_stack([str(path)])), expected)
    assert_equal(sums(load_stack([f"{path}:-2"])), {name: -2 * array for name, array in expected.items()})


def test_paths_are_relative_to_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    inside = recipe(
        folder / "sub/r.toml", f'[[adapter]]\nsource = "../a.gguf"\n[[adapter]]\nsource = "{folder}/b.gguf"\n'
    )
    monkeypatch.chdir("/")
    assert [lora.source for lora, _ in load_stack([str(inside)]).entries] == [
        folder / "sub/../a.gguf",
        folder / "b.gguf",
    ]
    monkeypatch.chdir(folder)
    elsewhere = recipe(folder / "sub/r.toml", '[[adapter]]\nsource = "a.gguf"\n')
    assert [str(lora.source) for lora, _ in load_stack([str(elsewhere)]).entries] == ["a.gguf"]


def test_the_base_is_relative_to_the_recipe_too(folder: Path) -> None:
    (folder / "base").mkdir()
    path = recipe(folder / "r.toml", 'base = "base"\n[[adapter]]\nsource = "a.gguf"\n')
    assert Recipe.read(path).base == str(folder / "base")


def test_recipes_in_recipes_multiply_scales_and_add_steps(folder: Path) -> None:
    recipe(folder / "inner.toml", '[[adapter]]\nsource = "a.gguf"\nscale = 0.5\n[[adapter]]\nsource = "b.gguf"\n')
    outer = recipe(
        folder / "outer.toml",
        """
        [[adapter]]
        source = "inner.toml"
        scale = 4
        scales = { "blk.0.*" = 0.25 }
        [[adapter]]
        source = "a.gguf"
        """,
    )
    a, b = load(folder / "a.gguf"), load(folder / "b.gguf")
    stack = load_stack([f"{outer}:-1", f"{folder}/inner.toml:2"])
    assert stack.names == ("a", "b", "a#2", "a#3", "b#2")
    expected = {
        name: (-1 * (4 * (0.25 if name.startswith("blk.0.") else 1)) + 2) * (0.5 * dense(a, name) + dense(b, name))
        - dense(a, name)
        for name in NAMES
    }
    assert_equal(sums(stack), expected)


def test_a_recipe_that_is_part_of_itself_is_refused(folder: Path) -> None:
    recipe(folder / "one.toml", '[[adapter]]\nsource = "two.toml"\n')
    recipe(folder / "two.toml", '[[adapter]]\nsource = "one.toml"\n')
    with pytest.raises(ArgumentError, match=r"one\.toml: the recipe is part of itself"):
        load_stack([f"{folder}/one.toml"])
    twice = recipe(folder / "plain.toml", '[[adapter]]\nsource = "a.gguf"\n')
    assert len(load_stack([str(twice), str(twice)])) == 2


def test_recipes_with_different_bases_are_refused(folder: Path) -> None:
    for name in "mn":
        recipe(folder / f"{name}.toml", f'base = "{name}"\n[[adapter]]\nsource = "a.gguf"\n')
    with pytest.raises(ArgumentError, match="the recipes name different bases: m, n"):
        load_stack([f"{folder}/m.toml", f"{folder}/n.toml"])
    assert Recipe.of_words([f"{folder}/m.toml", f"{folder}/a.gguf"]).base == "m"


def test_every_adapter_that_cannot_be_loaded_is_listed(folder: Path) -> None:
    (folder / "broken.gguf").write_bytes((folder / "a.gguf").read_bytes()[:400])
    with pytest.raises(ArgumentError, match="cannot load the stack: 2 problems") as caught:
        load_stack([f"{folder}/no.gguf", f"{folder}/a.gguf", f"{folder}/broken.gguf:0.5"])
    assert "no.gguf: there is no such file or folder" in caught.value.problems[0]
    assert "broken.gguf: the header needs" in caught.value.problems[1]


def test_every_adapter_with_names_of_another_kind_is_listed(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot load the stack: 2 problems") as caught:
        load_stack([f"{folder}/a.gguf", f"{folder}/a", f"{folder}/b.gguf", f"{folder}/b"])
    for name, line in zip("ab", caught.value.problems, strict=True):
        assert line.startswith(f"{name} has Hugging Face names, a on this stack has GGUF tensor names")
        assert "convert_names(lora, base)" in line


def test_a_step_that_finds_nothing_is_an_error(folder: Path) -> None:
    for step in ('select = "blk.9.*"', 'scales = { "blk.9.*" = 1.0 }'):
        path = recipe(folder / "r.toml", f'[[adapter]]\nsource = "a.gguf"\n{step}\n')
        with pytest.raises(ArgumentError, match=r"no weight matches .*blk\.9\.\*.*named like blk\.0\.attn_q\.weight"):
            load_stack([str(path)])


def test_an_adapter_that_is_not_the_recipes_is_refused_with_both_hashes(folder: Path) -> None:
    right = hashlib.sha256((folder / "a.gguf").read_bytes()).hexdigest()
    path = recipe(folder / "r.toml", f'[[adapter]]\nsource = "a.gguf"\nsha256 = {{ "a.gguf" = "{right}" }}\n')
    assert len(load_stack([str(path)])) == 1
    (folder / "a.gguf").write_bytes((folder / "b.gguf").read_bytes())
    other = hashlib.sha256((folder / "b.gguf").read_bytes()).hexdigest()
    with pytest.raises(ArgumentError, match=f"a.gguf is not the file of the recipe: .*{other}.*{right}.* wanted"):
        load_stack([str(path)])


# ---- the recipe in what was baked


def kept_recipe(path: Path) -> str:
    """The recipe as the format's own package reads it."""
    if path.is_dir():
        with safe_open(path / "adapter_model.safetensors", "np") as file:
            return file.metadata()["lorastack.recipe"]
    return gguf.GGUFReader(path).fields["lorastack.recipe"].contents()


def tensors(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        raw = (path / "adapter_model.safetensors").read_bytes()
        return {
            "all": raw[8 + int.from_bytes(raw[:8], "little") :],
            "config": (path / "adapter_config.json").read_bytes(),
        }
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def assert_bakes_again(path: Path, folder: Path) -> Recipe:
    """From the kept recipe alone the same tensors come out, and the same recipe."""
    said = recipe(folder / "kept.toml", kept_recipe(path))
    stack = load_stack([str(said)], **({"base": base} if (base := Recipe.read(said).base) else {}))
    again = stack.bake().save(folder / f"again{path.suffix}", force=True)
    assert tensors(again) == tensors(path)
    assert kept_recipe(again) == kept_recipe(path)
    return Recipe.read(said)


@pytest.mark.parametrize("ending", [".gguf", ""])
def test_what_was_baked_can_be_baked_again_from_its_recipe(folder: Path, ending: str) -> None:
    stack = load_stack([f"{folder}/a{ending}:0.7", f"{folder}/b{ending}:-0.3", f"{folder}/a{ending}:0"])
    said = assert_bakes_again(stack.bake().save(folder / f"both{ending}"), folder)
    assert [(one.source, one.scale, one.name) for one in said.ingredients] == [
        (f"{folder}/a{ending}", 0.7, "a"), (f"{folder}/b{ending}", -0.3, "b"), (f"{folder}/a{ending}", 0.0, "a"),
    ]  # fmt: skip
    files = [folder / "a.gguf"] if ending else sorted((folder / "a").glob("adapter_*"))
    assert dict(said.ingredients[0].sha256) == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert said.base is None


@pytest.mark.parametrize("ending", [".gguf", ""])
def test_views_made_in_python_are_in_the_recipe(folder: Path, ending: str) -> None:
    zero = "blk.0" if ending else "model.layers.0"
    view = load(folder / f"a{ending}").scaled({f"{zero}.*": np.float32(0.5), re.compile(r".*\.3\..*"): 2}).scaled(1.5)
    part = load(folder / f"b{ending}", name="bee").select(re.compile(r".*\.[012]\.ATTN_Q\.weight", re.IGNORECASE))
    inner = LoraStack([(view, 0.5), (part, 1.0)]).bake()
    stack = LoraStack([(inner, -2.0), (part.without_extras(), 0.25)])
    path = stack.bake().save(folder / f"views{ending}")
    said = assert_bakes_again(path, folder)
    assert [(one.name, one.scale) for one in said.ingredients] == [("a", -1.0), ("bee", -2.0), ("bee", 0.25)]
    assert len(load(path).adapters) == len(NAMES)
    true = {n: -1 * dense(view, n) + (-1.75 * dense(part, n) if n in part.adapters else 0) for n in view.adapters}
    assert_equal(sums(LoraStack([(load(path), 1.0)])), true)
    assert len(part.adapters) == 3


def test_an_adapter_saved_as_it_is_has_a_recipe_too(folder: Path) -> None:
    path = load(folder / "a.gguf").scaled(0.5).save(folder / "half.gguf")
    said = assert_bakes_again(path, folder)
    assert said.ingredients[0].steps == (("scales", {"*": 0.5}),)
    assert "lorastack.recipe" not in gguf.GGUFReader(load(path).save(folder / "bare.gguf", recipe=False)).fields


def test_two_formats_baked_with_a_base_bake_again_without_being_told_the_base(demo: Path, tmp_path: Path) -> None:
    words = [f"{demo}/excited.gguf:0.7", f"{demo}/luna:-0.3"]
    for naming, output in (("hf", "both"), ("gguf", "both.gguf")):
        for base in (demo / "base", demo / "base.gguf"):
            if naming == "hf" and base.suffix:
                continue  # Hugging Face names come from a Hugging Face base
            stack = load_stack(words, base=str(base), naming=naming)
            said = assert_bakes_again(stack.bake().save(tmp_path / output, force=True), tmp_path)
            assert said.base == str(base)
            assert sorted(step for one in said.ingredients for step in one.steps) == [("names", naming)]


def test_a_recipe_with_names_to_convert_and_no_base_says_so(demo: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.toml", f'[[adapter]]\nsource = "{demo}/luna"\nsteps = [{{ names = "gguf" }}]\n')
    with pytest.raises(
        ArgumentError, match=r"luna: names are converted to 'gguf', which needs the base; give it as base="
    ):
        load_stack([str(path)])
    assert load_stack([str(path)], base=str(demo / "base.gguf")).naming == "gguf"


def test_an_adapter_made_in_memory_is_said_to_be(tmp_path: Path) -> None:
    path = LoraStack([(adapter(0).renamed("mine"), 0.5)]).bake().save(tmp_path / "x.gguf")
    said = Recipe.parse(kept_recipe(path), "x")
    assert [(one.source, one.scale, one.sha256) for one in said.ingredients] == [("(in memory) mine", 0.5, ())]
    with pytest.raises(FormatError, match=r"\(in memory\) mine: there is no such file or folder"):
        said.stack()


def test_an_adapter_from_the_hub_is_named_by_its_id_and_revision(folder: Path) -> None:
    cache = folder / "models--owner--my.loras" / "snapshots" / "0123abcd"
    adapter(0, "hf").save(cache.parent.mkdir(parents=True) or cache, recipe=False)
    adapter(0, "hf").save(cache / "inner", recipe=False)
    sources = [Recipe.of_lora(load(path)).ingredients[0].source for path in (cache, cache / "inner")]
    assert sources == ["owner/my.loras@0123abcd", "owner/my.loras/inner@0123abcd"]


def test_a_conversion_is_a_step(demo: Path) -> None:
    lora = convert_names(load(demo / "luna"), str(demo / "base.gguf"))
    (one,) = Recipe.of_lora(lora).ingredients
    assert one.steps == (("names", "gguf"),)
