"""The page: its numbers are compare's, hostile names do nothing, nothing is fetched, and a real browser draws it."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorastack import LoadedLora, LoraDelta, LoraStack, TargetModule, load
from lorastack.algebra.compare import compare
from lorastack.cli import main
from lorastack.errors import ArgumentError, NamingError
from lorastack.inspect import inspect
from lorastack.recipe import Recipe
from lorastack.report import report
from lorastack.report.findings import find
from lorastack.report.places import NO_LAYER, grid, split
from lorastack.report.words import cosine, number, percent
from tests.browser import words
from tests.updates import SHAPES, adapter, dense, linear, update

HOSTILE = "<script>alert(1)</script><!-- \"'&</title><img src=https://example.invalid/x onerror=alert(2)>"


@pytest.fixture
def stack(demo: Path) -> LoraStack:
    return LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), 0.3)])


def figures(text: str) -> dict[str, list[dict[str, Any]]]:
    """Title -> the figures of that title, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for title, data in re.findall(
        r'<figure><h3>(.*?)</h3><div [^>]*></div><script type="application/json" class="figure">(.*?)</script>', text
    ):
        found.setdefault(html.unescape(title), []).append(json.loads(data))
    return found


def own(text: str) -> str:
    """The page without the plotting library."""
    return re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def table(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is that, by column."""
    for whole in re.findall(r"<table[^>]*>(.*?)</table>", text, re.DOTALL):
        columns = [html.unescape(one) for one in re.findall(r'<th scope="col">(.*?)</th>', whole)]
        if columns[0] == first:
            rows = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", whole, re.DOTALL)
            return [dict(zip(columns, cells(row.replace("<wbr>", "")), strict=True)) for row in rows]
    return []


def cells(text: str) -> list[str]:
    return [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)]


def test_the_numbers_are_compares(stack: LoraStack, demo: Path, tmp_path: Path) -> None:
    text = report(stack, tmp_path / "report.html", demo / "base").read_text()
    found = compare(stack, demo / "base", intruders=None)
    drawn = figures(text)

    at = grid(found.weights)
    for one in found.adapters:
        norms = drawn[one.name][0]["data"][0]
        of = {w.name: w for w in one.weights}
        for m, module in enumerate(at.modules):
            for n, layer in enumerate(at.layers):
                (weight,) = at.cells[module, layer]
                assert norms["z"][m][n] == pytest.approx(of[found.weights[weight]].relative)
        lines = drawn[one.name][1]["data"]
        assert len(lines) == len(at.modules)
        for line in lines:
            spectra = [w.spectrum for w in one.weights if split(w.name)[2] == line["name"]]
            squares = sum(w.norm**2 for w in one.weights if split(w.name)[2] == line["name"])
            assert sum(np.square(line["y"])) * len(spectra) == pytest.approx(squares)
        for shown in (number(one.norm), percent(one.relative)):
            assert shown in cells(text)

    conflict = drawn["luna and robot"][0]["data"][0]
    assert found.by_weight is not None
    for m, module in enumerate(at.modules):
        for n, layer in enumerate(at.layers):
            (weight,) = at.cells[module, layer]
            assert conflict["z"][m][n] == pytest.approx(found.by_weight.cosine[weight, 0, 1])
    (pair,) = table(text, "pair")
    assert pair["cosine"] == cosine(float(found.cosine[0, 1]))
    assert pair["norm kept"].startswith(percent(found.pileup[0, 1]))
    assert pair["signs differ"] == percent(found.sign_conflict[0, 1])

    three = LoraStack([*stack.entries, (load(demo / "luna", name="moon"), -0.2)])
    matrix = figures(report(three, tmp_path / "three.html").read_text())["Cosine"][0]["data"][0]
    np.testing.assert_allclose(np.array(matrix["z"], float), compare(three).cosine)


def test_a_foretold_loss_is_that_of_the_bake(stack: LoraStack) -> None:
    found = find(stack)
    assert found.exact == 16
    assert [bake.rank for bake in found.bakes] == [8, 16]
    for rank in (2, 8):
        made = stack.bake(rank=rank).made
        assert found.curve[rank] == pytest.approx(made["error"], rel=1e-9)
    eight = found.bakes[0]
    assert eight.worst_error == pytest.approx(max(made["errors"].values()))
    assert eight.worst == max(made["errors"], key=made["errors"].__getitem__)
    baked = stack.bake(rank=8)
    assert eight.parameters == sum(f.array.size for d in baked.adapters.values() for f in d.factors)
    assert found.curve[found.exact] < 1e-6 <= found.curve[found.exact - 1]


def test_no_rank_above_the_sums_own_is_foretold(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for ranks, wanted in (((4,), [4]), ((1, 1), [2]), ((8,), [8]), ((5, 6), [8, 11]), ((20, 20), [8, 16, 32, 40])):
        stack = LoraStack([(adapter(f"n{n}", w=linear(rng, 60, 50, rank)), 1.0) for n, rank in enumerate(ranks)])
        found = find(stack)
        assert [bake.rank for bake in found.bakes] == wanted
        (bake,) = found.bakes[-1:]
        assert bake.error < 1e-6
        text = report(stack, tmp_path / "x.html", force=True).read_text()
        assert f"has rank {sum(ranks)}: from there on nothing is lost" in text
        rows = [row["bake at"] for row in table(text, "bake at")]
        assert rows == ([f"rank {rank}" for rank in wanted] if len(wanted) > 1 else [])
        assert ("Relative error" in figures(text)) == (sum(ranks) > 2)


def test_if_independent_is_of_these_norms(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    stack = LoraStack(
        [
            (adapter(n, w=linear(rng, 9, 8, 2), v=linear(rng, 9, 8, 1)), s)
            for n, s in zip("abc", (1, -3, 0.2), strict=True)
        ]
    )
    dense_norms = [
        float(np.sqrt(sum(np.sum(dense(one, scale) ** 2) for one in lora.adapters.values())))
        for lora, scale in stack.entries
    ]
    text = report(stack, tmp_path / "x.html").read_text()
    assert f"({percent(math.hypot(*dense_norms) / sum(dense_norms))} if they were independent)" in text
    kept = {row["pair"]: row["norm kept"] for row in table(text, "pair")}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        alone = math.hypot(dense_norms[i], dense_norms[j]) / (dense_norms[i] + dense_norms[j])
        assert kept[f"{'abc'[i]} + {'abc'[j]}"].endswith(f"({percent(alone)} if independent)")
    assert compare(stack).to_dict()["independent_pileup"] == pytest.approx(math.hypot(*dense_norms) / sum(dense_norms))


def test_where_one_number_says_it_nothing_is_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    one, two = (adapter(name, w=linear(rng, 9, 8, 1)) for name in "ab")
    text = report(LoraStack([(one, 1.0), (two, 0.5)]), tmp_path / "x.html").read_text()
    assert figures(text) == {}
    plain = html.unescape(text)
    found = compare(LoraStack([(one, 1.0), (two, 0.5)]))
    for measured in found.adapters:
        assert f"{measured.name}: a norm of {number(measured.norm)}, at w." in plain
        assert f"{measured.name}: rank 1, so each update has one singular value: {number(measured.norm)} (w)." in plain
    assert f"The cosine of a and b is {cosine(float(found.cosine[0, 1]))}: " in plain
    assert f"a and b: {cosine(float(found.cosine[0, 1]))}, at w." in plain
    assert re.search(r"A bake at rank 1 loses [\d.]+ %. A bake at rank 2 loses nothing.", plain)
    # A third one, and something to see at another place.
    several = adapter("c", w=linear(rng, 9, 8, 3), v=linear(rng, 9, 8, 2))
    text = report(LoraStack([(one, 1.0), (two, 0.5), (several, 1.0)]), tmp_path / "y.html").read_text()
    assert {title: len(drawn) for title, drawn in figures(text).items()} == {"c": 2, "Cosine": 1, "Relative error": 1}
    apart = LoraStack([(one, 1.0), (adapter("d", v=linear(rng, 9, 8, 1)), 1.0)])
    assert "a and d: they change no weight in common." in report(apart, tmp_path / "z.html").read_text()


def test_every_figure_is_said_in_words_and_in_a_table(stack: LoraStack, demo: Path, tmp_path: Path) -> None:
    three = LoraStack([*stack.entries, (load(demo / "luna", name="moon"), -0.2)])
    text = report(three, tmp_path / "report.html", demo / "base").read_text()
    drawn = figures(text)
    said = re.findall(r'<div class="plot" role="img" aria-label="(.*?)"', text)
    assert len(said) == sum(map(len, drawn.values())) == 3 + 3 + 1 + 3 + 1
    assert len(set(said)) == len(said)
    (losses,) = (one for one in said if one.startswith("Relative error: "))
    (eight,) = (one for one in find(three).bakes if one.rank == 8)
    assert f"{percent(eight.error)} at rank 8" in losses
    measured = compare(three, demo / "base", intruders=None).adapters[1]
    strongest = measured.strongest(1)[0]
    assert f"to {percent(strongest.relative)} at v_proj, layer 3" in said[1]
    numbers = re.findall(r'<table class="numbers">(.*?)</table>', text, re.DOTALL)
    assert len(numbers) == len(said)
    for weight in measured.weights:
        assert f">{percent(weight.relative)}</td>" in numbers[1]
    assert len(re.findall("<caption>", text)) == len(re.findall("<table", text))
    for head in re.findall(r"<th(?: [^>]*)?>", own(text)):
        assert 'scope="' in head
    assert '<html lang="en">' in text
    levels = [int(level) for level in re.findall(r"<h([1-6])>", own(text))]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_title_is_the_mixture(stack: LoraStack, tmp_path: Path) -> None:
    text = report(stack, tmp_path / "x.html").read_text()
    assert "<title>luna:0.7 + robot:0.3 – LoRA report</title>" in text
    assert "<h1>luna:0.7 + robot:0.3</h1>" in text
    assert 'class="soft mixture"' not in text
    rng = np.random.default_rng(8)
    long = LoraStack([(adapter("n" * 58 + f"{n:02d}", w=linear(rng, 9, 8, 1)), 0.5) for n in range(9)])
    text = report(long, tmp_path / "y.html").read_text()
    title = re.search(r"<h1>(.*?)</h1>", text)
    assert title
    assert len(title[1]) <= 80
    assert title[1].endswith("00:0.5 + nnnnnnnnnnn…nnnnnnnnnn01:0.5 + 7 more")
    below = re.search(r'<p class="soft mixture">(.*?)</p>', text)
    assert below
    assert below[1] == " + ".join(f"{name}:0.5" for name in long.names)


def test_nothing_that_rounds_to_zero_has_a_sign(tmp_path: Path) -> None:
    a, b = np.eye(2, 4, dtype=np.float32), np.array([[1.0, 0], [-0.0004, 1], [0, 0]], np.float32)
    names = [f"layers.{n}.w" for n in range(2)]
    one = adapter("a", **{name: LoraDelta(a[:1], b[:, :1]) for name in names})
    two = adapter("b", **{name: LoraDelta(a[:1], b[:, 1:]) for name in names})
    text = report(LoraStack([(one, 1.0), (two, 1.0)]), tmp_path / "x.html").read_text()
    assert not re.findall(r"[-−]0(?:\.0*)?(?![\d.])", re.sub(r"<script.*?</script>", "", own(text), flags=re.DOTALL))
    (drawn,) = figures(text)["a and b"]
    assert drawn["data"][0]["text"] == [["0.00", "0.00"]]


def test_nothing_is_loaded_from_anywhere(stack: LoraStack, tmp_path: Path) -> None:
    text = report(stack, tmp_path / "report.html").read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""\b(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", own(text))
    assert not re.findall(r"<(?:link|iframe|object|embed|img|base)\b|@import|url\(", own(text))
    assert "http" not in own(text).replace("http-equiv", "")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {f"layers.{n}.</script><b>{HOSTILE}.weight": linear(rng, 6, 5, 2) for n in range(2)}
    one = LoadedLora.from_tensors(weights, name=HOSTILE)
    text = report(LoraStack([(one, 1.0), (one, -0.5)]), tmp_path / "x.html").read_text()
    for forbidden in ("<script>alert", "<img", "</title><", "<b>", "<!-- "):
        assert forbidden not in own(text)
    assert html.escape(HOSTILE) in text
    for several in figures(text).values():
        for figure in several:
            assert "<script" not in json.dumps(figure["data"])
            assert "<b>" not in json.dumps(figure["layout"])


def test_a_single_adapter_has_no_similarity(demo: Path, tmp_path: Path) -> None:
    text = report(LoraStack([(load(demo / "luna"), 1.0)]), tmp_path / "one.html").read_text()
    assert "One adapter changes" in text
    assert "How alike" not in text
    assert "Where they conflict" not in text
    assert set(figures(text)) == {"luna", "Relative error"}


def test_what_is_said_in_words(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    w, other = linear(rng, 9, 8, 2), linear(rng, 9, 8, 2)
    stack = LoraStack([(adapter("a", w=w), 1.0), (adapter("b", w=w), -0.9), (adapter("c", v=other), 1.0)])
    text = html.unescape(report(stack, tmp_path / "words.html").read_text())
    assert "a and b have a cosine of −1.00: one undoes the other. Weight by weight, they cancel at 1 of 2." in text
    assert "One weight has a cosine below −0.1." in text
    assert "independent: each does what it does alone" in text
    twins = LoraStack([(adapter("a", w=w), 1.0), (adapter("b", w=w), 0.5)])
    text = report(twins, tmp_path / "twins.html").read_text()
    assert "practically the same update" in text
    assert "a and b are near duplicates (cosine 1.0000): one of them, scaled by 1.5" in html.unescape(text)
    silent = LoraStack([(adapter("a", w=w), 1.0), (adapter("b", w=w), 0.0)])
    assert "one of them changes nothing" in report(silent, tmp_path / "silent.html").read_text()


def test_what_is_left_out_is_named_once(shared: Path, tmp_path: Path) -> None:
    folder = shared / "stories260k" / "adapters"
    stack = LoraStack([(load(folder / "excited-dora"), 1.0), (load(folder / "zara"), 0.5)])
    text = report(stack, tmp_path / "dora.html").read_text()
    assert len(re.findall(r"excited-dora: not in any number here: \d+ dora", text)) == 1
    assert len(re.findall(r"\d+ dora: ", text)) == 1
    assert "--drop-extras" in text


def test_the_recipe_makes_the_stack_again(stack: LoraStack, tmp_path: Path) -> None:
    text = report(stack, tmp_path / "report.html").read_text()
    match = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert match
    assert not re.search(r"source = \"/", match[1])
    again = Recipe.parse(html.unescape(match[1]), "page", tmp_path).stack()
    assert again.names == stack.names
    assert [scale for _, scale in again.entries] == [0.7, 0.3]


def test_many_adapters_are_cut_with_a_word(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    stack = LoraStack([(adapter(f"n{n}", w=linear(rng, 9, 8, 1)), 1.0) for n in range(10)])
    text = report(stack, tmp_path / "many.html").read_text()
    assert "The 8 strongest of 10 are shown." in text
    assert "The 8 pairs of 45" in text
    many = LoraStack([(adapter(f"n{n}", w=linear(rng, 9, 8, 1)), 1.0) for n in range(33)])
    assert "With so many adapters" in report(many, tmp_path / "many.html", force=True).read_text()


def test_every_kind_of_update_and_none_at_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    one, two = (adapter(name, **{kind: update(rng, kind) for kind in SHAPES}) for name in "ab")
    text = report(LoraStack([(one, 1.0), (two, -2.0)]), tmp_path / "kinds.html").read_text()
    assert figures(text)["a"][0]["layout"]["yaxis"]["ticktext"] == list(SHAPES)
    text = report(LoraStack([(one, 0.0), (two, 0.0)]), tmp_path / "nothing.html").read_text()
    assert "one of them changes nothing" in text
    assert "loses nothing" in text


def test_the_grid_has_rows_for_what_is_in_no_layer() -> None:
    names = ["model.layers.10.mlp.up_proj.weight", "lm_head.weight", "model.layers.2.self_attn.q_proj.weight"]
    at = grid(names)
    assert at.modules == ["q_proj", "up_proj", "lm_head"]
    assert at.layers == ["2", "10", NO_LAYER]
    assert at.cells["lm_head", NO_LAYER] == [1]
    assert at.values(lambda cell: float(cell[0])) == [[2.0, None, None], [None, 0.0, None], [None, None, 1.0]]
    towers = grid(["encoder.layers.0.q_proj.weight", "decoder.layers.0.q_proj.weight"])
    assert towers.modules == ["encoder.layers: q_proj", "decoder.layers: q_proj"]
    experts = grid([f"model.layers.0.experts.{n}.w{k}.weight" for n in range(30) for k in (1, 2)])
    assert experts.modules == ["experts.*.w*"]
    assert len(experts.cells["experts.*.w*", "0"]) == 60


class ByPlace:
    """An adapter known by (target module, layer) only."""

    rank, alpha, target_modules, layers = 2, 4.0, (TargetModule.QUERY_PROJ,), (0, 1)

    def delta(self, target: TargetModule, layer: int) -> Any:
        return linear(np.random.default_rng(layer), 64, 64, 2)


def test_adapters_of_the_second_list_need_the_base(demo: Path, tmp_path: Path) -> None:
    stack = LoraStack([(load(demo / "luna"), 1.0)])
    stack.push_adapter(ByPlace())
    with pytest.raises(ArgumentError, match=r"give report\(\) the base"):
        report(stack, tmp_path / "x.html")
    text = report(stack, tmp_path / "x.html", demo / "base").read_text()
    assert "adapter1" in figures(text)
    assert len(stack) == 1


def test_bad_outputs_and_stacks(stack: LoraStack, tmp_path: Path, shared: Path) -> None:
    with pytest.raises(ArgumentError, match="empty"):
        report(LoraStack(), tmp_path / "x.html")
    with pytest.raises(ArgumentError, match="does not exist"):
        report(stack, tmp_path / "nowhere" / "x.html")
    with pytest.raises(NamingError):
        report(stack, tmp_path / "x.html", shared / "gguf_cases" / "base_tied.gguf")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(ArgumentError, match="force=True"):
        report(stack, tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "mine"
    report(stack, tmp_path / "x.html", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]


def command(*words: object, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", f"{code}from lorastack.cli import main; main()", "report", *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_command(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    output = ["-o", "both.html"]
    words = ["report", f"{demo}/luna:0.7", f"{demo}/robot:0.3", "--base", f"{demo}/base", "--intruders", *output]
    monkeypatch.setattr(sys, "argv", ["lorastack", *words])
    main_ended(0)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"both.html: 2 adapters, \d\.\d MiB\n", out)
    assert err == ""
    text = (tmp_path / "both.html").read_text()
    assert 'data-label="intruders"' in text
    assert f"layers of {html.escape('base')}." in text
    main_ended(1)
    assert "--force" in capsys.readouterr().err
    for wrong, said in (
        (["report", f"{demo}/luna", "-o", "x.pdf"], "ends with .html"),
        (["report", f"{demo}/luna", "--intruders", "-o", "x.html"], "--base"),
    ):
        monkeypatch.setattr(sys, "argv", ["lorastack", *wrong])
        main_ended(1)
        assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["both.html"]


def main_ended(code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == code


def test_without_plotly_the_error_has_the_install_line(demo: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['plotly'] = None\n"
    done = command(demo / "luna", "-o", "x.html", cwd=tmp_path, code=code)
    assert done.returncode == 1
    assert "pip install 'lorastack[report]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    """Words that start a real browser without a window, and with its console on the error stream."""
    return [*words(tmp_path / "profile"), "--enable-logging=stderr", "--virtual-time-budget=10000"]


def test_a_browser_draws_every_figure_without_an_error(
    browser: list[str], stack: LoraStack, demo: Path, tmp_path: Path
) -> None:
    hostile = LoadedLora.from_tensors(dict(stack.entries[0][0].adapters), name=HOSTILE)
    mixed = LoraStack([*stack.entries, (LoadedLora(HOSTILE, hostile.adapters, naming="hf"), 0.1)])
    path = report(mixed, tmp_path / "report.html", demo / "base")
    done = subprocess.run(
        [*browser, "--dump-dom", path.as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    drawn, wanted = re.findall(r'<svg class="main-svg"', done.stdout), re.findall("<figure>", done.stdout)
    assert len(wanted) == 3 + 3 + 1 + 3 + 1
    assert len(drawn) >= len(wanted)
    assert len(re.findall(r'class="hm"', done.stdout)) == 3 + 1 + 3
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr


def test_it_prints_on_paper(browser: list[str], stack: LoraStack, tmp_path: Path) -> None:
    path, paper = report(stack, tmp_path / "report.html"), tmp_path / "report.pdf"
    subprocess.run([*browser, f"--print-to-pdf={paper}", path.as_uri()], capture_output=True, check=True, timeout=120)
    assert paper.read_bytes().startswith(b"%PDF")


def test_what_an_adapter_is_does_not_depend_on_the_order(demo: Path, tmp_path: Path) -> None:
    words = [str(demo / "excited.gguf"), str(demo / "luna")]
    said = []
    for n, order in enumerate((words, words[::-1])):
        stack = Recipe.of_words(order).stack(base=str(demo / "base"))
        path = report(stack, tmp_path / f"{n}.html", demo / "base")
        rows = table(path.read_text(), "adapter")
        said.append({row["adapter"]: (row["format"], row["trained on"], row["rank"], row["alpha"]) for row in rows})
    assert said[0] == said[1]
    for word in words:
        one = inspect(load(word))
        assert said[0][one.name][:2] == (one.format, Path(one.base or one.architecture or "").name)
    assert {one[0] for one in said[0].values()} == {"GGUF", "PEFT"}
