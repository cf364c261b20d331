"""Targets: one function for each reader, of an input's bytes and an empty folder; each with its seeds.

What a reader takes is held against what the format's own library finds, looked at as `inspect` does, and baked, saved
and loaded again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from safetensors.numpy import save as save_safetensors

from lorastack import LoadedLora, load
from lorastack.base import convert_names, open_base
from lorastack.base.fit import misfits
from lorastack.base.model import BaseModel
from lorastack.core.patterns import Matcher, PatternTable
from lorastack.core.target import place_of
from lorastack.errors import LoraStackError, NonFiniteError
from lorastack.formats.training import training_of
from lorastack.hub import resolve
from lorastack.inspect import inspect
from lorastack.mixture import parse_mixture, parse_spec
from lorastack.recipe import Recipe
from tests.fuzz import seeds
from tests.fuzz.guard import Work
from tests.fuzz.journey import journey, on
from tests.fuzz.peers import check_against_gguf, check_against_pairs, check_against_peft

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
#: No more names are made of one input.
MOST_KEYS = 200


def read(path: Path) -> LoadedLora:
    """The adapter with all it holds read and looked at, NaN let through."""
    lora = load(path)
    try:
        lora.check()
    except NonFiniteError:
        lora = load(path, allow_nonfinite=True)
        lora.check()
    for values in lora.extras.values():
        for value in values.values():
            if hasattr(value, "raw"):
                value.raw()
    inspect(lora).to_dict()
    return lora


def _onwards(path: Path, folder: Path) -> None:
    """Take a file that was read all the way, unless it holds NaN or Inf."""
    on(load(path), folder)


def _gguf(data: bytes, folder: Path) -> None:
    path = folder / "x.gguf"
    path.write_bytes(data)
    lora = read(path)
    check_against_gguf(path, lora)
    _onwards(path, folder)


def _peft(config: bytes, weights: bytes, folder: Path) -> None:
    there = put(folder / "x", {CONFIG: config, WEIGHTS: weights})
    lora = read(there)
    check_against_peft(there, lora)
    _onwards(there, folder)


def _safetensors(data: bytes, folder: Path) -> None:
    _peft(seeds.config(), data, folder)


def _config(data: bytes, folder: Path) -> None:
    _peft(data, seeds.safetensors(), folder)


def _pickled(data: bytes, folder: Path) -> None:
    there = put(folder / "x", {CONFIG: seeds.config(), "adapter_model.bin": data})
    read(there)
    _onwards(there, folder)


def _index(data: bytes, folder: Path) -> None:
    there = put(folder / "x", {CONFIG: seeds.plain_config(), f"{WEIGHTS}.index.json": data, **seeds.shards()})
    read(there)
    _onwards(there, folder)


def _keys(data: bytes, folder: Path) -> None:
    """Lines are the keys of a file of weights, each with a shape that its ending asks for."""
    lines = data.decode(errors="replace").split("\n")[:MOST_KEYS]
    place_of(lines[0])
    tensors = {key: np.ones(_shape_of(key), np.float32) for key in lines}
    there = put(folder / "x", {CONFIG: seeds.plain_config(), WEIGHTS: save_safetensors(tensors)})
    lora = read(there)
    for name in lora.adapters:
        place_of(name)
    _answer(lambda: lora.places)
    _onwards(there, folder)


def _shape_of(key: str) -> tuple[int, ...]:
    if "embedding_A" in key:
        return (2, 9)
    if "lora_A" in key:
        return (2, 8)
    return (8, 2) if "lora_B" in key or "embedding_B" in key else (8,)


def _image(data: bytes, folder: Path) -> None:
    """kohya, ComfyUI, diffusers and LyCORIS, told apart by their keys; with a base their names are resolved."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    lora = read(path)
    check_against_pairs(path, lora)
    training_of(lora.metadata)
    base = BaseModel("b", "hf", None, {}, seeds.IMAGE_BASE)
    _answer(lambda: convert_names(lora, base, "hf").check())
    _answer(lambda: misfits(lora, base))
    _answer(lambda: load(path, rank=2).check())
    _onwards(path, folder)


def _mlx(data: bytes, folder: Path) -> None:
    there = put(folder / "x", {CONFIG: seeds.mlx_config(), "adapters.safetensors": data})
    read(there)
    _onwards(there, folder)


def _mlx_config(data: bytes, folder: Path) -> None:
    there = put(folder / "x", {CONFIG: data, "adapters.safetensors": seeds.mlx()})
    read(there)
    _onwards(there, folder)


def _recipe(data: bytes, folder: Path) -> None:
    """A line ``#@ NAME.toml`` begins another recipe, beside the first."""
    _neighbours(folder)
    path = folder / "r.toml"
    first, *others = re.split(rb"^#@ (\w{1,50}\.toml)\n", data, flags=re.MULTILINE)
    path.write_bytes(first)
    for name, text in zip(others[::2], others[1::2], strict=True):
        (folder / name.decode()).write_bytes(text)
    recipe = Recipe.read(path)
    assert Recipe.parse(recipe.to_toml(), "again").ingredients == recipe.ingredients, (
        "it is another recipe when written"
    )
    if all(one.source.startswith(str(folder)) for one in recipe.ingredients):  # any other may lie on the hub
        load(path).check()


def _mixture(data: bytes, folder: Path) -> None:
    _neighbours(folder)
    words = data.decode(errors="surrogateescape").split("\n")[:50]
    for word in words:
        one = parse_spec(word)
        assert np.isfinite(one.scale), "a scale that is not finite"
        assert one.source in word, "its source is no part of it"
        assert one.name is None or word.startswith(one.name) or word.lstrip().startswith(one.name), "nor its name"
    for word in words:
        with contextlib.suppress(LoraStackError):
            assert all(map(np.isfinite, parse_mixture(word).values())), "a scale that is not finite"
    before = Path.cwd()
    os.chdir(folder)  # the words name files in there
    try:
        Recipe.of_words(words).seen_from(folder)
    finally:
        os.chdir(before)


def _patterns(data: bytes, _: Path) -> None:
    """The first line is a pattern, the others are names."""
    first, *names = data.decode(errors="replace").split("\n")[:20]
    table = PatternTable({first: 1, "other": 2})
    if not table.bad:
        for name in names:
            _same_as_python(f"(.*\\.)?({first})$", name, lambda name=name: table.first(name, 0) == 1)
    for pattern in (first, f"re:{first}"):
        hits = Matcher(pattern)
        for name in names:
            found = hits(name)
            if pattern != first:
                _same_as_python(f"(?:{first})\\Z", name, lambda found=found: found)


def _same_as_python(pattern: str, name: str, hits: Callable[[], bool]) -> None:
    """The answer is the one of the ``regex`` package, which reads what Python reads and can be stopped.

    It can be when no part of the pattern has to be in every match: then it does not look for that first.
    """
    found = hits()
    try:
        expected = regex.match(f"(?!)|{pattern}", name, timeout=0.5) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError):
        return
    assert found == expected, f"{pattern!r} and {name!r}: {found}"


def _base_config(data: bytes, folder: Path) -> None:
    there = put(folder / "b", {"config.json": data, "model.safetensors": seeds.base_weights()})
    _with_base(there, folder)


def _base_index(data: bytes, folder: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": seeds.base_weights(), "model.safetensors.index.json": data}
    base = open_base(put(folder / "b", files))
    for name in base.shapes:
        base.weight(name)


def _base_weights(data: bytes, folder: Path) -> None:
    files = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": data}
    base = open_base(put(folder / "b", files))
    for name in base.shapes:
        base.weight(name)


def _base_gguf(data: bytes, folder: Path) -> None:
    path = folder / "b.gguf"
    path.write_bytes(data)
    base = open_base(path)
    for name in base.shapes:
        base.weight(name)
    _with_base(path, folder)


def _with_base(there: Path, folder: Path) -> None:
    """Ask a base what it is, and convert an adapter's names with it."""
    base = open_base(there)
    for ask in (lambda: base.layers, lambda: base.heads, lambda: base.kv_heads, lambda: base.architecture):
        _answer(ask)
    files = {CONFIG: seeds.plain_config(), WEIGHTS: save_safetensors(seeds.pair())}
    adapter, other = load(put(folder / "x", files)), folder / "y.gguf"
    other.write_bytes(seeds.small_gguf())
    _answer(lambda: convert_names(adapter, base, "gguf").check())
    _answer(lambda: convert_names(load(other), base, "hf").check())


def _answer(ask: Callable[[], object]) -> None:
    """Ask on, whatever the library answers."""
    try:
        ask()
    except LoraStackError as error:
        str(error)


def _hub(data: bytes, folder: Path) -> None:
    """Ids are looked for in an empty cache, without a network."""
    (folder / "x").mkdir()
    text = data.decode(errors="surrogateescape")
    given, _, subfolder = text.partition("\n")
    resolve(given, subfolder or None)


def _neighbours(folder: Path) -> None:
    """The adapters that recipes and mixtures name: ``x`` and ``y.gguf``; and a recipe, ``in.toml``."""
    put(folder / "x", {CONFIG: seeds.plain_config(), WEIGHTS: save_safetensors(seeds.pair())})
    (folder / "y.gguf").write_bytes(seeds.small_gguf())
    (folder / "in.toml").write_text('[[adapter]]\nsource = "x"\nscale = 2\n')


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Target(NamedTuple):
    """A reader: what it does with an input, the inputs to start from, and the form that the mutator knows."""

    work: Work
    seeds: Callable[[], tuple[bytes, ...]]
    form: str


TARGETS: dict[str, Target] = {
    "gguf": Target(_gguf, lambda: (seeds.gguf_adapter(), seeds.small_gguf(), *seeds.own_files()), "gguf"),
    "safetensors": Target(_safetensors, lambda: (seeds.safetensors(),), "safetensors"),
    "config": Target(_config, lambda: (seeds.config(),), "json"),
    "pickled": Target(_pickled, seeds.pickled, "archive"),
    "index": Target(_index, lambda: (seeds.index(),), "json"),
    "keys": Target(_keys, lambda: seeds.KEYS, "text"),
    "image": Target(_image, seeds.images, "safetensors"),
    "mlx": Target(_mlx, lambda: (seeds.mlx(),), "safetensors"),
    "mlx_config": Target(_mlx_config, lambda: (seeds.mlx_config(),), "json"),
    "recipe": Target(_recipe, lambda: seeds.RECIPES, "text"),
    "mixture": Target(_mixture, lambda: seeds.MIXTURES, "text"),
    "patterns": Target(_patterns, lambda: seeds.PATTERNS, "text"),
    "hub": Target(_hub, lambda: seeds.HUB, "text"),
    "base_config": Target(_base_config, lambda: (seeds.base_config(),), "json"),
    "base_index": Target(_base_index, lambda: (seeds.base_index(),), "json"),
    "base_weights": Target(_base_weights, lambda: (seeds.base_weights(),), "safetensors"),
    "base_gguf": Target(_base_gguf, lambda: (seeds.gguf_base(),), "gguf"),
    "journey": Target(journey, lambda: tuple(bytes((n * k) % 256 for k in range(40)) for n in range(12)), "choices"),
}
