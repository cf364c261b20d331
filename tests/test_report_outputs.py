"""A report as Markdown and as pictures: its numbers are compare's, names are texts, all of it appears or nothing."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from lorastack import LoadedLora, LoraStack, load
from lorastack.algebra.compare import compare
from lorastack.cli import main
from lorastack.errors import ArgumentError
from lorastack.report import report
from lorastack.report.colours import DARK, INKS, LIGHT, ink_on, mixed
from lorastack.report.outputs import Outputs, write
from lorastack.report.words import cosine, number, percent
from tests.browser import words
from tests.updates import SHAPES, adapter, dense, linear, update

HOSTILE = "a|b\n# c <script>alert(1)</script>\"'&]]><!-- --> `x` [l](http://x.invalid) \x00\x1b[2J\ufffe \\| *y*"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def stack(demo: Path) -> LoraStack:
    return LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), -0.3), (load(demo / "luna", name="moon"), 1)])


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """First column's name -> rows by column, as a reader of Markdown that is not ours sees them."""
    found = {}
    for whole in re.findall(r"<table>(.*?)</table>", rendered(text), re.DOTALL):
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)
                for row in re.findall(r"<tr>(.*?)</tr>", whole, re.DOTALL)]  # fmt: skip
        columns, *others = [[html.unescape(cell) for cell in row] for row in rows]
        found[columns[0]] = [dict(zip(columns, row, strict=True)) for row in others]
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in root.iter(f"{SVG}text")]


def test_the_tables_numbers_are_those_of_the_algebra(stack: LoraStack, demo: Path, tmp_path: Path) -> None:
    found = compare(stack, demo / "base", intruders=None)
    text = write(stack, Outputs(markdown=tmp_path / "r.md"), demo / "base")
    assert (tmp_path / "r.md").read_text() == text
    rows = tables(text)
    for row, (lora, scale), measured in zip(rows["adapter"], stack.entries, found.adapters, strict=True):
        norm = float(np.sqrt(sum(np.sum(dense(one, scale) ** 2) for one in lora.adapters.values())))
        assert (row["adapter"], row["scale"], row["norm"]) == (measured.name, f"{scale:g}", number(norm))
        assert row["share of base"] == percent(measured.relative)
        assert row["parameters"] == f"{sum(f.array.size for d in lora.adapters.values() for f in d.factors):,}"
    names = [lora.name for lora, _ in stack.entries]
    sums = [np.concatenate([dense(lora.adapters[n], scale).ravel() for n in stack.weights])
            for lora, scale in stack.entries]  # fmt: skip
    assert len(rows["pair"]) == 3
    for row in rows["pair"]:
        one, other = (sums[names.index(name)] for name in row["pair"].split(" + "))
        assert row["cosine"] == cosine(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
        kept = np.linalg.norm(one + other) / (np.linalg.norm(one) + np.linalg.norm(other))
        assert row["norm kept"].startswith(percent(float(kept)))
    eight = next(row for row in rows["bake at"] if row["bake at"] == "rank 8")
    assert eight["relative error"] == percent(stack.bake(rank=8).made["error"])
    assert "luna and moon are near duplicates" in text
    assert f"have a cosine of {cosine(1.0)}" in text


def test_no_path_of_a_machine_is_in_it(stack: LoraStack, demo: Path, tmp_path: Path) -> None:
    text = write(stack, Outputs(markdown=tmp_path / "r.md", svg=tmp_path / "pictures"), demo / "base")
    for file in (tmp_path / "r.md", *(tmp_path / "pictures").iterdir()):
        assert str(demo) not in file.read_text()
        assert str(tmp_path) not in file.read_text()
    assert "4 layers of base." in text


def test_without_plotly_there_is_markdown(demo: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['plotly'] = None\nfrom lorastack.cli import main; main()"

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-c", code, "report", f"{demo}/luna:0.7", f"{demo}/robot", *words]
        return subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = command("--markdown", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["adapter"] for row in tables(done.stdout)["adapter"]] == ["luna", "robot"]
    assert "![" not in done.stdout
    done = command("--markdown", "r.md", "--svg", "pictures")
    assert done.returncode == 1
    assert "pip install 'lorastack[report]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_figure_of_the_page_is_a_picture_that_the_markdown_links(
    stack: LoraStack, demo: Path, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    page = report(
        stack, tmp_path / "r.html", demo / "base", markdown=tmp_path / "a b" / "r.md", svg=tmp_path / "my pictures"
    )
    pictures = sorted(path.name for path in (tmp_path / "my pictures").iterdir())
    assert pictures == sorted(
        [f"{kind}-{n}.svg" for kind in ("norms", "spectrum") for n in (1, 2, 3)]
        + ["conflict-1-2.svg", "conflict-1-3.svg", "conflict-2-3.svg", "cosines.svg", "losses.svg"]
    )
    assert len(pictures) == len(re.findall("<figure>", page.read_text()))
    linked = re.findall(r'<img src="(.*?)" alt="(.*?)"', rendered((tmp_path / "a b" / "r.md").read_text()))
    assert [src for src, _ in linked] == [f"../my%20pictures/{name}" for name in (
        "norms-1.svg norms-2.svg norms-3.svg spectrum-1.svg spectrum-2.svg spectrum-3.svg cosines.svg conflict-1-3.svg "
        "conflict-1-2.svg conflict-2-3.svg losses.svg").split()]  # fmt: skip
    said = re.findall(r'role="img" aria-label=".*?: (.*?)"', page.read_text())
    assert len(said) == len(linked)
    for src, alt in linked:
        root = ElementTree.parse(tmp_path / "my pictures" / src.rpartition("/")[2]).getroot()
        described = root.findtext(f"{SVG}desc") or ""
        assert html.unescape(alt).endswith(described)
        assert described in map(html.unescape, said)


def test_a_pictures_numbers_are_the_figures(stack: LoraStack, demo: Path, tmp_path: Path) -> None:
    write(stack, Outputs(svg=tmp_path / "p"), demo / "base")
    found = compare(stack, demo / "base", intruders=None)
    cells = texts(ElementTree.parse(tmp_path / "p/norms-2.svg").getroot())
    for weight in found.adapters[1].weights:
        assert percent(weight.relative) in cells
    cells = texts(ElementTree.parse(tmp_path / "p/cosines.svg").getroot())
    assert [cell for cell in cells if re.fullmatch(r"[−\d.]+\.\d\d", cell)] == [
        cosine(float(value)) for value in found.cosine.ravel()]  # fmt: skip
    root = ElementTree.parse(tmp_path / "p/losses.svg").getroot()
    at = {
        float(text.get("x", "")): text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"
    }
    rank_of = {text: x for x, text in at.items()}
    levels = {text.text: float(text.get("y", "")) - 4 for text in root.iter(f"{SVG}text")
              if (text.text or "").endswith("%") and text.get("text-anchor") == "end"}  # fmt: skip
    (circle,) = (one for one in root.iter(f"{SVG}circle") if abs(float(one.get("cx", "")) - rank_of["8"]) < 0.2)
    error = (levels["0%"] - float(circle.get("cy", ""))) / (levels["0%"] - levels["100%"])
    assert error == pytest.approx(stack.bake(rank=8).made["error"], abs=1e-3)


def test_hostile_names_are_text_in_tables_and_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f"layers.{n}.{HOSTILE}.weight": linear(rng, 6, 5, 2) for n in range(2)}
    one = LoadedLora.from_tensors(weights, name=HOSTILE)
    text = write(LoraStack([(one, 1.0), (one, -0.5), (one, 0.2)]), Outputs(tmp_path / "x.html", svg=tmp_path / "p"))
    shown = rendered(text)
    for forbidden in ("<script", "<a ", "<!--", "<code>"):
        assert forbidden not in shown
    rows = tables(text)
    assert [len(rows[first]) for first in ("adapter", "pair", "weight")] == [3, 3, 4]
    named = " ".join(HOSTILE.split()).replace("\x00", "\\x00").replace("\x1b", "\\x1b")
    assert rows["adapter"][0]["adapter"] == named
    assert rows["weight"][0]["weight"] == f"layers.0.{named}.weight"
    assert len(list((tmp_path / "p").iterdir())) == 10
    for path in (tmp_path / "p").iterdir():
        root = ElementTree.parse(path).getroot()
        kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert kinds <= {"svg", "title", "desc", "style", "rect", "text", "path", "circle"}
        assert {key for element in root.iter() for key in element.attrib} <= {
            *"viewBox width height role class x y rx text-anchor d cx cy r stroke-dasharray".split()}  # fmt: skip
        assert "url(" not in path.read_text()
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "").replace("http://x.invalid", "")


def test_every_kind_of_update_and_none_at_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    one, two = (adapter(name, **{kind: update(rng, kind) for kind in SHAPES}) for name in "ab")
    for n, scales in enumerate(((1.0, -2.0), (0.0, 0.0))):
        folder = tmp_path / f"p{n}"
        text = write(LoraStack([(one, scales[0]), (two, scales[1])]), Outputs(svg=folder))
        for path in folder.iterdir():
            assert "nan" not in path.read_text().lower()
            ElementTree.parse(path)
        assert "nan" not in text
    assert not [path for path in (tmp_path / "p1").iterdir() if path.name.startswith(("spectrum", "losses"))]
    assert "it changes nothing." in text


def test_where_a_sentence_says_it_there_is_no_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    one, two = (adapter(name, w=linear(rng, 9, 8, 1)) for name in "ab")
    text = write(LoraStack([(one, 1.0), (two, 0.5)]), Outputs(svg=tmp_path / "p"))
    assert list((tmp_path / "p").iterdir()) == []
    assert "a: rank 1, so each update has one singular value" in text
    assert "![" not in text


def test_all_of_it_appears_or_nothing(stack: LoraStack, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "r.html", tmp_path / "r.md", tmp_path / "pictures")
    (tmp_path / "r.md").write_text("mine")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ArgumentError) as caught:
        write(stack, outputs)
    assert len(caught.value.problems) == 2
    write(stack, outputs, force=True)
    before = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    write(stack, outputs, force=True)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == before
    edited = tmp_path / "pictures/losses.svg"
    edited.write_text(edited.read_text().replace("Relative", "My relative"))
    with pytest.raises(ArgumentError, match=r"pictures holds more than an adapter \('losses.svg'\)"):
        write(stack, outputs, force=True)
    assert "My relative" in edited.read_text()
    with pytest.raises(ArgumentError, match="two of its outputs are at one place"):
        write(stack, Outputs(tmp_path / "same", tmp_path / "same"))
    with pytest.raises(ArgumentError, match="does not exist"):
        write(stack, Outputs(markdown=tmp_path / "nowhere/r.md", svg=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_command(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def command(code: int, *words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["lorastack", "report", f"{demo}/luna:0.7", f"{demo}/robot", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        return capsys.readouterr()

    out, err = command(0, "--markdown", "r.md", "--svg", "pictures")
    assert re.fullmatch(r"r.md: 2 adapters, [\d.]+ KiB\npictures: 6 pictures\n", out)
    assert err == ""
    printed, _ = command(0, "--markdown", "-", "--svg", "pictures", "--force", "-q")
    assert printed == Path("r.md").read_text()
    said = json.loads(command(0, "--markdown", "n.md", "--svg", "n", "--json")[0])
    assert said == {"output": None, "markdown": "n.md", "adapters": 2, "size": None,
                    "svg": sorted(str(path) for path in Path("n").iterdir())}  # fmt: skip
    assert "there is nothing to write" in command(1)[1]
    assert "--markdown - and --json both print" in command(1, "--markdown", "-", "--json")[1]
    assert "r.md exists" in command(1, "--markdown", "r.md")[1]
    both = command(1, "--markdown", "r.md", "--svg", "pictures", "-o", "new.html")[1]
    assert "the report cannot be written: 2 problems" in both
    assert not Path("new.html").exists()


def test_text_stands_out_from_paper_and_cells() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear_ = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(np.dot(linear_, (0.2126, 0.7152, 0.0722)))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    for scheme in (LIGHT, DARK):
        assert contrast(scheme.ink, scheme.paper) > 7
        for line in scheme.lines:
            assert contrast(line, scheme.paper) > 3
        for scale in (scheme.diverging, scheme.sequential):
            for step in range(64):
                colour = mixed(scale, step / 63)
                assert contrast(ink_on(colour), colour) == max(contrast(ink, colour) for ink in INKS) > 4.5


def test_in_a_browser_every_text_lies_in_its_picture_and_follows_the_scheme(tmp_path: Path) -> None:
    start = words(tmp_path / "profile")
    rng = np.random.default_rng(2)
    weights = [f"model.layers.{n}.{m}.weight" for n in range(30) for m in ("self_attn.q_proj", "a_module_of_long_name")]
    loras = [adapter(name, **{w: linear(rng, 9, 8, 3) for w in [*weights, "model.embed_tokens.weight"]})
             for name in ("Long-Names-of-Models_" * 3, "short", "a name with spaces & more " * 3)]  # fmt: skip
    write(LoraStack([(one, 1.0) for one in loras]), Outputs(svg=tmp_path / "p"))
    pictures = "".join(path.read_text() for path in sorted((tmp_path / "p").iterdir()))
    script = """<script>
const out = [];
for (const svg of document.querySelectorAll("svg")) {
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBBox();
    const within = box.x >= 0 && box.y >= 0 && box.x + box.width <= width && box.y + box.height <= height;
    if (!within) out.push(text.textContent);
  }
}
document.body.dataset.found = JSON.stringify([out, document.querySelectorAll("text").length,
  getComputedStyle(document.querySelector("text")).fill]);
</script>"""
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{pictures}{script}')
    for scheme, more in ((LIGHT, []), (DARK, ["--blink-settings=preferredColorScheme=0"])):
        run = [*start, *more, "--dump-dom", page.as_uri()]
        done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
        (found,) = re.findall('data-found="(.*?)"', done.stdout)
        outside, count, ink = json.loads(html.unescape(found))
        assert outside == []
        assert count > 150
        assert ink == "rgb({}, {}, {})".format(*(int(scheme.ink[at : at + 2], 16) for at in (1, 3, 5)))
