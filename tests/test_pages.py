"""Pages in a real browser: none is wider than the screen, and everything that is written can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load
from lorastack.report import report
from tests.browser import Browser, browser
from tests.updates import adapter, linear

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
#: Widths of a phone, a tablet and a desk.
WIDTHS = (390, 800, 1400)

#: Functions of the page that the checks below need: luminance, contrast, the colour an element stands on.
LOOK = """
  const light = (c) => { const [r, g, b] = c.map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort(); return (Math.max(x, y) + 0.05) /
    (Math.min(x, y) + 0.05); };
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const under = (element) => { for (let at = element; at; at = at.parentElement) {
    const [r, g, b, a = 1] = parts(getComputedStyle(at).backgroundColor);
    if (a > 0 && at instanceof HTMLElement) return [r, g, b]; } return [255, 255, 255]; };
"""

#: Of every written text the least contrast with what it stands on, the numbers in cells left to the next one.
TEXTS = f"""(() => {{ {LOOK}
  for (const part of document.querySelectorAll("details")) part.open = true;
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const at = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !at.getClientRects().length) continue;
    if (at.closest("script, noscript, style, .textpoint")) continue;
    const style = getComputedStyle(at);
    const ink = parts(at.closest("svg") ? style.fill : style.color).slice(0, 3);
    found.push([contrast(ink, under(at)), walker.currentNode.data.slice(0, 40)]);
  }}
  return found.sort((a, b) => a[0] - b[0]); }})()"""

#: Of every number in a cell its contrast with the pixel of the drawn cell, beside the number.
CELLS = f"""(async () => {{ {LOOK}
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {{
    const image = plot.querySelector(".hm image");
    const texts = [...plot.querySelectorAll(".textpoint text")];
    if (!image || !texts.length) continue;
    const picture = new Image();
    picture.src = image.getAttribute("href") ?? image.getAttribute("xlink:href");
    await picture.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    const paper = canvas.getContext("2d");
    paper.drawImage(picture, 0, 0);
    const box = image.getBoundingClientRect();
    for (const text of texts) {{
      const at = text.getBoundingClientRect();
      const x = ((at.left + at.right) / 2 - box.left) * canvas.width / box.width;
      const y = ((at.top + at.bottom) / 2 - box.top) * canvas.height / box.height;
      const cell = [...paper.getImageData(x, y, 1, 1).data];
      const ink = parts(getComputedStyle(text).fill).slice(0, 3);
      found.push([contrast(ink, cell.slice(0, 3)), text.textContent, cell[3]]);
    }}
  }}
  return found; }})()"""

#: Of every line its contrast with the card.
LINES = f"""(() => {{ {LOOK}
  return [...document.querySelectorAll("path.js-line")].map((line) =>
    contrast(parts(getComputedStyle(line).stroke).slice(0, 3), under(line.closest("figure")))); }})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def many(count: int, layers: int, rank: int = 2) -> LoraStack:
    """Adapters of names with sixty letters and strengths of their own."""
    rng = np.random.default_rng(count)
    stack = LoraStack()
    for n in range(count):
        weights = {
            f"model.layers.{layer}.{module}.weight": linear(rng, 12, 10, rank, float(rng.uniform(0.01, 0.5)))
            for layer in range(layers)
            for module in MODULES
        }
        stack.push(LoadedLora.from_tensors(weights, name=f"{n:02d}" + "style" * 11 + "x" * 3), (-1) ** n * 0.4)
    return stack


@pytest.fixture(scope="module")
def pages(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of every shape: the demo, many adapters and layers with long names, one weight, another in no layer."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    luna, robot = load(demo / "luna"), load(demo / "robot")
    long = "model.language_model." + "part." * 20 + "weight"
    stacks = {
        "demo": LoraStack([(luna, 0.7), (robot, 0.3)]),
        "one": LoraStack([luna]),
        "eight": many(8, 5),
        "deep": many(2, 40),
        "weight": LoraStack([(adapter("w" * 60, **{long: linear(rng, 9, 8, 1)}), 1.0)]),
        "three": LoraStack([(luna, 1.0), (robot, -1.5), (load(demo / "luna", name="moon"), 0.9)]),
    }
    return {name: report(stack, folder / f"{name}.html") for name, stack in stacks.items()}


@pytest.mark.parametrize("name", ["demo", "one", "eight", "deep", "weight", "three"])
def test_no_page_is_wider_than_the_screen(tab: Browser, pages: dict[str, Path], name: str) -> None:
    for width in WIDTHS:
        tab.open(pages[name], width)
        check_width(tab, width)
    assert tab.console == []


def check_width(tab: Browser, width: int) -> None:
    """Nothing sticks out, of the page or of a plot; what is wide by nature scrolls by itself."""
    assert tab.ask("document.documentElement.scrollWidth") <= width
    tab.ask('for (const part of document.querySelectorAll("details")) part.open = true')
    assert tab.ask("document.documentElement.scrollWidth") <= width
    out = """[...document.querySelectorAll(".plot text, .plot rect")].filter((one) => {
      const [at, plot] = [one, one.closest(".plot")].map((part) => part.getBoundingClientRect());
      return at.width && one.closest(".infolayer, .xaxislayer-above, .yaxislayer-above")
        && (at.right > plot.right + 1 || at.left < plot.left - 1 || at.bottom > plot.bottom + 1); })
      .map((one) => one.textContent)"""
    assert tab.ask(out) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["demo", "three", "eight", "weight"])
def test_everything_that_is_written_can_be_read(tab: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    for width in (390, 1400):
        tab.open(pages[name], width, dark)
        least = tab.ask(TEXTS)
        assert len(least) > 30
        assert least[0][0] >= 4.5, least[:5]
        assert all(one >= 3 for one in tab.ask(LINES))


@pytest.mark.parametrize("dark", [False, True])
def test_the_numbers_in_cells_stand_out_from_their_colour(tab: Browser, pages: dict[str, Path], dark: bool) -> None:
    shades: set[Sequence[float]] = set()
    for name, drawn in (("demo", 3 * 28), ("three", 6 * 28 + 9)):
        tab.open(pages[name], 1400, dark)
        found = tab.ask(CELLS)
        assert len(found) == drawn
        assert {opaque for _, _, opaque in found} == {255}
        assert min(found)[0] >= 4.5, sorted(found)[:5]
        shades |= {round(one, 1) for one, _, _ in found}
    assert len(shades) > 20  # the colours do differ


def test_without_javascript_the_numbers_are_there(tab: Browser, pages: dict[str, Path]) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["demo"], 390, settle=False)
        empty = tab.ask('[...document.querySelectorAll(".plot")].filter((one) => one.getClientRects().length).length')
        assert empty == 0
        assert tab.ask('document.querySelectorAll("table.numbers td").length') > 3 * 28
        assert "need JavaScript" in tab.ask("document.body.innerText")
        assert tab.ask("document.documentElement.scrollWidth") <= 390
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
