"""Figures of a card: pictures that a folder's README.md links, written with it, replaced with it, never somebody's."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from lorastack import LoadedLora, LoraStack, load, merge, save
from lorastack.algebra.compare import compare
from lorastack.cli import main
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, MissingDependencyError, NonFiniteError
from lorastack.report.words import cosine, number
from tests.updates import dense

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "a|b\n# c <script>alert(1)</script>\"'&]]><!-- --> `x` [l](http://x.invalid) \x00\x1b[2J\ufffe \\| *y*"


@pytest.fixture
def both(demo: Path) -> LoadedLora:
    return LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), -0.3)]).bake(name="both")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def linked(folder: Path) -> dict[str, str]:
    """Place -> words of every picture, as a reader of Markdown that is not ours sees the card."""
    card = MarkdownIt("commonmark").enable("table").render((folder / "README.md").read_text().split("---\n", 2)[2])
    assert "<script" not in card
    return {src: html.unescape(alt) for src, alt in re.findall(r'<img src="(.*?)" alt="(.*?)"', card)}


def drawn(folder: Path) -> set[str]:
    return {f"figures/{path.name}" for path in (folder / "figures").iterdir()}


def texts(path: Path) -> list[str]:
    return [one.text or "" for one in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["lorastack", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# ---- what is drawn


def test_the_card_links_every_picture_with_its_words(both: LoadedLora, tmp_path: Path) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    found = linked(folder)
    assert list(found) == [f"figures/{name}.svg" for name in ("norms-1", "spectrum-1", "conflict-1-2")]
    assert set(found) == drawn(folder)
    for place, alt in found.items():
        root = ElementTree.parse(folder / place).getroot()
        assert alt == f"{root.findtext(f'{SVG}title')}: {root.findtext(f'{SVG}desc')}"
    assert str(tmp_path) not in "".join(map(str, contents(folder).values()))


def test_the_numbers_are_those_of_the_dense_updates(both: LoadedLora, tmp_path: Path) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    cells = texts(folder / "figures/norms-1.svg")
    for delta in both.adapters.values():
        assert number(float(np.linalg.norm(dense(delta)))) in cells
    (one, _), (two, _) = both.origin
    pairs = [(dense(one.adapters[name], 0.7), dense(two.adapters[name], -0.3)) for name in both.adapters]
    expected = [cosine(float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))) for a, b in pairs]
    assert len(set(expected)) > 5
    assert not Counter(expected) - Counter(texts(folder / "figures/conflict-1-2.svg"))


def test_of_many_the_cosine_of_every_pair_is_drawn_and_of_one_none(demo: Path, tmp_path: Path) -> None:
    loras = [load(demo / "luna"), load(demo / "robot"), load(demo / "luna", name="moon")]
    stack = LoraStack([(one, 1.0) for one in loras])
    folder = save(stack.bake(rank=4), tmp_path / "three", figures=True)
    assert drawn(folder) == {f"figures/{name}.svg" for name in ("norms-1", "spectrum-1", "cosines")}
    cells = texts(folder / "figures/cosines.svg")
    measured = compare(stack, intruders=None).cosine
    assert {cosine(float(measured[0, 1])), cosine(float(measured[0, 2]))} < set(cells)
    assert drawn(save(loras[0], tmp_path / "one", figures=True)) == {"figures/norms-1.svg", "figures/spectrum-1.svg"}


def test_what_is_not_in_the_figures_is_said(tmp_path: Path) -> None:
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    lora = LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}, name="one", naming="hf")
    bias = {"model.layers.0.self_attn.q_proj.bias": Factor.of(np.ones(5, np.float32), "bias")}
    with_bias = LoadedLora("one", lora.adapters, {"bias": bias}, naming="hf")
    text = (save(with_bias, tmp_path / "out", figures=True) / "README.md").read_text()
    assert "\n\nNorm of the update: one: a norm of 11, at q_proj, layer 0.\n\n" in text
    assert "\n\nNot in the figures: 1 bias: a trained bias of the base layer.\n" in text


def test_names_are_texts_whatever_they_hold(demo: Path, tmp_path: Path) -> None:
    loras = [load(demo / name, name=f"{HOSTILE}{n}") for n, name in enumerate(("luna", "robot", "luna"))]
    folder = save(
        LoraStack([(one, 1.0) for one in loras]).bake(name=HOSTILE), tmp_path / "out", recipe=False, figures=True
    )
    assert set(linked(folder)) == drawn(folder)
    for place in drawn(folder):
        tags = {one.tag for one in ElementTree.parse(folder / place).getroot().iter()}
        assert f"{SVG}script" not in tags


# ---- whole folders


def test_without_the_flag_nothing_is_drawn(both: LoadedLora, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['plotly'] = None\n"
        "from lorastack import load; load(sys.argv[1]).save(sys.argv[2])\n"
        "assert 'lorastack.report' not in sys.modules"
    )
    first = save(both, tmp_path / "first")
    done = subprocess.run([sys.executable, "-c", code, str(first), str(tmp_path / "out")], check=False)
    assert done.returncode == 0
    assert not (tmp_path / "out/figures").exists()
    assert "Figures" not in (tmp_path / "out/README.md").read_text()


def test_written_twice_it_is_the_same(both: LoadedLora, tmp_path: Path) -> None:
    one, two = (contents(save(both, tmp_path / name, figures=True)) for name in ("one", "two"))
    assert one == two


def test_the_weights_and_the_rest_of_the_card_are_those_without(both: LoadedLora, tmp_path: Path) -> None:
    plain, more = (contents(save(both, tmp_path / name, figures=name == "more")) for name in ("plain", "more"))
    assert {name: more[name] for name in plain if name != "README.md"} == {
        name: held for name, held in plain.items() if name != "README.md"
    }
    assert more["README.md"].startswith(plain["README.md"].rpartition(b"<!--")[0])


def test_force_replaces_them_and_leaves_none_behind(both: LoadedLora, tmp_path: Path) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    save(both, folder, figures=True, force=True)
    assert len(drawn(folder)) == 3
    save(both, folder, force=True)
    assert sorted(contents(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def _edit(folder: Path) -> str:
    picture = folder / "figures/norms-1.svg"
    picture.write_text(picture.read_text().replace("Norm", "My norm"))
    return "figures/norms-1.svg"


def _add(folder: Path) -> str:
    (folder / "figures/mine.png").write_bytes(b"mine")
    return "figures/mine.png"


def _link(folder: Path) -> str:
    (folder / "figures").rename(folder.parent / "elsewhere")
    (folder / "figures").symlink_to(folder.parent / "elsewhere")
    return "figures"


def _nest(folder: Path) -> str:
    (folder / "figures/more").mkdir()
    return "figures/more"


def _be_a_file(folder: Path) -> str:
    shutil.rmtree(folder / "figures")
    (folder / "figures").write_text("mine")
    return "figures"


@pytest.mark.parametrize("change", [_edit, _add, _link, _nest, _be_a_file])
def test_what_somebody_changed_is_kept(both: LoadedLora, tmp_path: Path, change: Any) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    named = change(folder)
    before = contents(folder)
    for figures in (True, False):
        said = rf"out holds more than an adapter \('{named}'\), and is not replaced"
        with pytest.raises(ArgumentError, match=said):
            save(both, folder, force=True, figures=figures)
    assert contents(folder) == before


def test_what_cannot_be_drawn_leaves_nothing(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    luna = load(demo / "luna")
    for name in ("out.gguf", "out.safetensors"):
        with pytest.raises(ArgumentError, match=rf"{name}: figures are those of a folder's card.*leave figures out"):
            save(luna, tmp_path / name, format="kohya" if "safe" in name else None, figures=True)
    pair = (np.full((2, 6), np.nan, np.float32), np.ones((5, 2), np.float32))
    broken = LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}, allow_nonfinite=True)
    with pytest.raises(NonFiniteError):
        save(broken, tmp_path / "nan", figures=True)
    for module in [name for name in sys.modules if name.startswith("lorastack.report")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lorastack\[report\]'"):
        save(luna, tmp_path / "out", figures=True)
    assert list(tmp_path.iterdir()) == []


def test_who_may_not_read_a_folder_may_not_read_its_figures(both: LoadedLora, tmp_path: Path) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    for path in (folder / "figures", folder / "figures/norms-1.svg"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    save(both, folder, figures=True, force=True)
    assert (folder / "figures").stat().st_mode & 0o777 == 0o700
    assert (folder / "figures/norms-1.svg").stat().st_mode & 0o777 == 0o600


# ---- who reads the folder


def test_readers_are_not_disturbed(both: LoadedLora, demo: Path, tmp_path: Path) -> None:
    folder = save(both, tmp_path / "out", figures=True)
    plain = save(both, tmp_path / "plain")
    again, other = load(folder), load(plain)
    for name, delta in other.adapters.items():
        np.testing.assert_array_equal(dense(again.adapters[name]), dense(delta))
    assert load(tmp_path / "out/adapter_model.safetensors").num_adapters() == 28


def test_peft_loads_the_folder(both: LoadedLora, demo: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = save(both, tmp_path / "out", figures=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(demo / "base")
    model = peft.PeftModel.from_pretrained(base, str(folder))
    assert model.peft_config["default"].r == 16
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    np.testing.assert_allclose(
        layer.get_delta_weight("default").detach().numpy(), dense(both.adapters[f"{name}.weight"])[0], atol=1e-5
    )


def test_diffusers_finds_the_weights_of_the_folder(tmp_path: Path) -> None:
    loaders = pytest.importorskip("diffusers.loaders")
    pair = (np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    one = LoadedLora.from_tensors({"unet.mid_block.attentions.0.proj_in.weight": pair}, name="ink", naming="hf")
    folder = save(one, tmp_path / "ink", format="diffusers", figures=True)
    weights, _ = loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(str(folder))
    assert len(weights) == 2
    assert load(folder).num_adapters() == 1


# ---- the command


def test_every_command_that_writes_a_folder_draws(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    luna, base = str(demo / "luna"), str(demo / "base")
    merge(base, LoraStack([(load(luna), 1.0)]), tmp_path / "tuned")
    for words in (
        ["bake", f"{luna}:0.7", f"{demo}/excited.gguf", "--base", base, "-o", "out"],
        ["convert", luna, "out", "--to", "mlx"],
        ["resize", luna, "--rank", "2", "-o", "out"],
        ["extract", str(tmp_path / "tuned"), base, "--rank", "2", "-o", "out"],
    ):
        assert command(monkeypatch, *words, "--figures") == 0
        assert set(linked(Path("out"))) == drawn(Path("out")) > {"figures/norms-1.svg"}, words
        assert str(demo) not in Path("out/README.md").read_text()
        assert command(monkeypatch, *words, "--force") == 0
        assert not Path("out/figures").exists()
        shutil.rmtree("out")
        capsys.readouterr()
        as_file = [{"out": "out.gguf", "mlx": "gguf"}.get(word, word) for word in words]
        assert command(monkeypatch, *as_file, "--figures") == 1
        assert "write a folder, or leave --figures out" in capsys.readouterr().err
        assert not Path("out.gguf").exists()
