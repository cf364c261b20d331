"""Cards: what README.md of a written folder says, that no path of this machine is in it, and whose words are kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lorastack import LoadedLora, LoraStack, convert_names, load, merge, save
from lorastack.algebra.bake import with_coefficient
from lorastack.cli import main
from lorastack.errors import ArgumentError
from lorastack.extracting import extract

HOSTILE = "a|b\n# c\n<script>alert(1)</script> `x` [l](http://x.invalid) \\| *y* _z_ \x1b[2J"


def front_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def rows_of(text: str) -> list[list[str]]:
    """The cells of every table's rows, as a reader of Markdown that is not ours sees them."""
    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<script" not in html
    assert "<a " not in html
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def saying(lora: Path, out: Path, base: str) -> Path:
    """The adapter with another base in its configuration."""
    shutil.copytree(lora, out)
    config = out / "adapter_config.json"
    config.write_bytes(orjson.dumps(orjson.loads(config.read_bytes()) | {"base_model_name_or_path": base}))
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return orjson.loads((folder / "adapter_config.json").read_bytes())


def off(baked: LoadedLora, stack: LoraStack) -> float:
    """The relative error of a baked adapter by the dense formula, in float64."""
    whole = lacking = 0.0
    for name in stack.weights:
        truth = sum(s * d.scaling * np.float64(d.b) @ np.float64(d.a) for s, d in stack.terms(name))
        delta = baked.adapters[name]
        found = delta.scaling * np.float64(delta.b) @ np.float64(delta.a)
        whole, lacking = whole + np.sum(truth**2), lacking + np.sum((truth - found) ** 2)
    return float(np.sqrt(lacking / whole))


def test_a_card_says_the_mixture_the_settings_and_the_error(demo: Path, tmp_path: Path) -> None:
    stack = LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), -0.3)])
    baked = stack.bake(name="both", rank=4)
    folder = save(baked, tmp_path / "both")
    text = (folder / "README.md").read_text()
    assert rows_of(text) == [["adapter", "scale"], ["luna", "0.7"], ["robot", "-0.3"]]
    assert "A LoRA adapter of rank 4 for 28 weights of lorastack-demo-base." in text
    assert "Settings: method svd, rank 4." in text
    assert f"The norm of what was cut off is {off(baked, stack):.3g} of the norm of the whole; at worst" in text
    worst = max(baked.made["errors"], key=baked.made["errors"].__getitem__)
    assert f"{baked.made['errors'][worst]:.3g}, at {worst}." in text
    assert ModelCard.load(folder / "README.md").data.to_dict() == {
        "library_name": "peft", "base_model": "lorastack-demo-base", "tags": ["lora", "lorastack"]}  # fmt: skip
    twice = save(with_coefficient(baked, 2.0), tmp_path / "twice")
    assert "coefficient 2" in (twice / "README.md").read_text()
    exact = save(stack.bake(name="exact"), tmp_path / "exact")
    assert "Nothing was cut off: its ranks are those of all, side by side." in (exact / "README.md").read_text()


def test_its_code_loads_the_folder(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save(load(demo / "luna"), tmp_path / "luna")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    here: dict[str, Any] = {}
    code = code.replace("lorastack-demo-base", str(demo / "base")).replace("path/of/this/folder", str(folder))
    exec(code, here)
    assert here["model"].peft_config["default"].r == 8


def test_every_command_that_writes_a_folder_writes_a_card(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    luna, base = str(demo / "luna"), str(demo / "base")
    for words, library, said in (
        (["bake", f"{luna}:0.7", f"{demo}/excited.gguf", "--base", base, "-o", "out"], "peft", "| excited | 1 | names"),
        (["convert", f"{demo}/excited.gguf", "out", "--base", base, "--to", "peft"], "peft", "It is this one"),
        (["convert", luna, "out", "--to", "mlx"], "mlx", "adapter_path="),
        (["resize", luna, "--rank", "2", "-o", "out"], "peft", "The norm of what was cut off is"),
        (["merge", base, luna, "-o", "out"], None, "# A merge into base"),
    ):
        monkeypatch.setattr("sys.argv", ["lorastack", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, words
        text = Path("out/README.md").read_text()
        assert front_of(Path("out")).get("library_name") == library
        assert said in text, words
        for place in (str(demo), str(tmp_path)):
            assert place not in text, words
        shutil.rmtree("out")


def test_without_the_recipe_no_byte_of_a_file_says_where_anything_is(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    luna, base = str(demo / "luna"), str(demo / "base")
    merge(base, LoraStack([(load(luna), 1.0)]), tmp_path / "tuned")
    for words in (
        ["bake", luna, f"{demo}/excited.gguf", "--base", base, "-o", "out"],
        ["bake", luna, f"{demo}/excited.gguf", "--base", base, "-o", "out.gguf"],
        ["convert", luna, "out", "--to", "mlx"],
        ["resize", luna, "--rank", "2", "-o", "out"],
        ["extract", str(tmp_path / "tuned"), base, "--rank", "2", "-o", "out"],
    ):
        for more, there in ([], True), (["--no-recipe", "--force"], False):
            monkeypatch.setattr("sys.argv", ["lorastack", *words, *more])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, words
            out = Path(words[-1] if words[0] != "convert" else "out")
            files = sorted(out.iterdir()) if out.is_dir() else [out]
            held = b"".join(file.read_bytes() for file in files)
            assert (b"lorastack.recipe" in held) is there, words
            assert (str(demo).encode() in held) is there, words
            assert there or str(tmp_path).encode() not in held, words
            assert there or b"recipe" not in held
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def test_a_folder_of_diffusers_has_a_card(tmp_path: Path) -> None:
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    one = LoadedLora.from_tensors({"unet.mid_block.attentions.0.proj_in.weight": pair}, name="ink", naming="hf")
    folder = save(one, tmp_path / "ink", format="diffusers")
    assert front_of(folder)["library_name"] == "diffusers"
    assert 'load_lora_weights("path/of/this/folder")' in (folder / "README.md").read_text()
    assert load(save(one, folder, format="diffusers", force=True)).num_adapters() == 1


def test_an_extracted_adapter_names_its_models_without_their_places(demo: Path, tmp_path: Path) -> None:
    merge(demo / "base", LoraStack([(load(demo / "luna"), 1.0)]), tmp_path / "tuned")
    folder = save(extract(tmp_path / "tuned", demo / "base", 4), tmp_path / "out")
    text = (folder / "README.md").read_text()
    assert "It is the difference of tuned and its base base, extracted with LoraStack." in text
    assert str(tmp_path) not in text
    assert "recipe" not in text, "one that names no file makes nothing again"
    assert "base_model_name_or_path" not in config_of(folder)


def test_hostile_names_are_text_in_a_card(demo: Path, tmp_path: Path) -> None:
    luna = load(demo / "luna", name=HOSTILE)
    weights = {f"{HOSTILE}.{n}.weight": (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32)) for n in range(2)}
    one = LoadedLora.from_tensors(weights, name="---\nlibrary_name: evil\n---", naming="hf")
    folder = save(LoraStack([(luna, 0.5), (luna, 0.25)]).bake(name=HOSTILE), tmp_path / "out")
    rows = rows_of((folder / "README.md").read_text())
    assert [len(row) for row in rows] == [2, 2, 2]
    assert rows[1] == [
        "a|b # c &lt;script&gt;alert(1)&lt;/script&gt; `x` [l](http://x.invalid) \\| *y* _z_ \\x1b[2J", "0.5",
    ]  # fmt: skip
    cut = save(LoraStack([(one, 0.5), (one, 0.25)]).bake(rank=1), tmp_path / "cut")
    assert front_of(cut)["library_name"] == "peft"
    assert len(rows_of((cut / "README.md").read_text())) == 3
    merge(demo / "base", LoraStack([(luna, 0.5)]), tmp_path / "merged")
    assert len(rows_of((tmp_path / "merged/README.md").read_text())[1]) == 2


def test_force_replaces_a_card_that_nobody_changed(demo: Path, tmp_path: Path) -> None:
    luna, robot = load(demo / "luna"), load(demo / "robot")
    folder = save(luna, tmp_path / "out")
    save(robot, folder, force=True)
    assert "# robot" in (folder / "README.md").read_text()
    for words in ("", "my own card\n", (folder / "README.md").read_text() + "Mine.\n",
                  (folder / "README.md").read_text().replace("# robot", "# My robot")):  # fmt: skip
        (folder / "README.md").write_text(words)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ArgumentError, match=r"out holds more than an adapter \('README.md'\), and is not replaced"):
            save(luna, folder, force=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "README.md").unlink()
    assert load(save(luna, folder, force=True)).name == "out"


def test_a_merge_says_what_was_cut_before(demo: Path, tmp_path: Path) -> None:
    stack = LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), 0.3)])
    merge(demo / "base", stack, tmp_path / "out", method="svd", rank=3)
    text = (tmp_path / "out/README.md").read_text()
    assert "Settings: rounding nearest, method svd, rank 3." in text
    assert f"The norm of what was cut off is {off(stack.bake(rank=3), stack):.3g} of the norm of the whole" in text


def test_force_keeps_a_merges_card_with_words_of_somebody_else(demo: Path, tmp_path: Path) -> None:
    stack = LoraStack([(load(demo / "luna"), 1.0)])
    merge(demo / "base", stack, tmp_path / "out")
    merge(demo / "base", stack, tmp_path / "out", force=True)
    with (tmp_path / "out/README.md").open("a") as card:
        card.write("Mine.\n")
    with pytest.raises(ArgumentError, match=r"out holds more than an adapter \('README.md'\)"):
        merge(demo / "base", stack, tmp_path / "out", force=True)


# ---- the base that is written


@pytest.mark.parametrize(
    ("said", "kept"),
    [("acme/base", "acme/base"), ("gpt2", "gpt2"), ("/models/base", None), ("../acme/base", None), ("~/base", None),
     ("C:\\models\\base", None), ("models--acme--base/snapshots/0a1b", "acme/base"), ("a/b/c", None), ("", None),
     ("here", None), ("acme/here", None)],
)  # fmt: skip
@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_the_base_is_what_the_adapter_says_unless_it_is_a_path(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, kept: str | None, format: Any
) -> None:
    (tmp_path / "acme/here").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    out = save(load(saying(demo / "luna", tmp_path / "luna", said)), tmp_path / "out", format=format)
    assert config_of(out).get("base_model_name_or_path" if format == "peft" else "model") == kept
    assert front_of(out).get("base_model") == kept
    if kept is None:
        assert "revision" not in config_of(out)
        assert not said or said not in (out / "README.md").read_text()


def test_of_several_the_base_is_what_they_agree_on(demo: Path, tmp_path: Path) -> None:
    words = {"a": "acme/base", "b": "acme/base", "path": "/models/base", "other": "acme/other", "silent": "",
             "place": "/models/other", "stored": "unsloth/base-bnb-4bit"}  # fmt: skip
    loras = {name: load(saying(demo / "luna", tmp_path / name, said)) for name, said in words.items()}

    def told(names: str, base: Path | None = None) -> str | None:
        stack = LoraStack([(loras[name], 1.0) for name in names.split()])
        out = save(stack.bake(base, allow_mixed_bases=True), tmp_path / "out", force=True)
        return config_of(out).get("base_model_name_or_path")

    assert told("a b") == told("a silent") == told("a path") == told("a", demo / "base") == "acme/base"
    assert told("a other") is told("a place") is told("a stored") is None
    assert told("path path", demo / "base") is None
    assert told("silent", demo / "base") is None
    assert told("a other", demo / "base") is None


def test_an_adapter_whose_names_were_converted_still_says_its_base(demo: Path, tmp_path: Path) -> None:
    lora = load(saying(demo / "luna", tmp_path / "luna", "acme/base"))
    there = convert_names(lora, str(demo / "base"), "gguf")
    out = save(convert_names(there, str(demo / "base"), "hf"), tmp_path / "out")
    assert config_of(out)["base_model_name_or_path"] == "acme/base"


def test_a_merge_into_a_base_of_the_hub_names_it(demo: Path, tmp_path: Path) -> None:
    base = tmp_path / "models--acme--base/snapshots/0a1b"
    shutil.copytree(demo / "base", base)
    merge(base, LoraStack([(load(demo / "luna"), 0.5)]), tmp_path / "out")
    assert front_of(tmp_path / "out")["base_model"] == "acme/base"
    merge(demo / "base", LoraStack([(load(demo / "luna"), 0.5)]), tmp_path / "local")
    assert "base_model" not in front_of(tmp_path / "local")
