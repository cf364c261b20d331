"""The page of a search: it is whole, tells what was found, fits a phone, and its surface goes through the trials."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("plotly")

from lorastack.report.landscape import _surface, landscape
from lorastack.torch import Tuned
from lorastack.torch.search import Trial
from tests.browser import Browser, browser
from tests.test_pages import LINES, TEXTS, WIDTHS, check_width
from tests.test_report import cells, figures, own, table


def tuned(names: Sequence[str], count: int = 12) -> Tuned:
    """A search whose best mixture is the third of its trials; one of them failed."""
    rows = [
        np.ones(len(names)),
        np.zeros(len(names)),
        *np.random.default_rng(0).uniform(-0.5, 1.5, (count, len(names))),
    ]
    scores = [20.0, 9.0, 4.0, *(5.0 + 40 * n for n in range(1, count - 1)), math.inf]
    trials = tuple(
        Trial(dict(zip(names, map(float, row), strict=True)), score) for row, score in zip(rows, scores, strict=True)
    )
    return Tuned((), trials[2].scales, 4.0, 20.0, 9.0, trials, "minimize", "perplexity")


def test_the_surface_goes_through_the_trials_and_follows_between_them() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-0.5, 1.5, (60, 2)), [[-0.5, -0.5], [1.5, 1.5], [-0.5, 1.5], [1.5, -0.5]]])

    def height(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x - 1.2) ** 2 + 2 * (y - 0.5) ** 2 + x * y

    scores = height(*points.T)
    at = _surface(points, scores, [np.sort(points[:, 0]), np.sort(points[:, 1])])
    x, y = (np.sort(column) for column in points.T)
    np.testing.assert_allclose(at, height(x[None], y[:, None]), atol=0.15)
    order = [np.argsort(np.argsort(column)) for column in points.T]
    np.testing.assert_allclose(at[order[1], order[0]], scores, atol=1e-6)


@pytest.mark.parametrize(("names", "kinds"), [("a", ["scatter"]), ("ab", ["contour"]), ("abc", ["scatter"] * 3)])
def test_the_page_is_whole_and_fetches_nothing(names: str, kinds: list[str]) -> None:
    wild = ["<script>alert(1)</script>" + name for name in names]
    page = landscape(tuned(wild))
    drawn = [one for several in figures(page).values() for one in several]
    assert [one["data"][0]["type"] for one in drawn] == kinds
    for one in drawn:
        assert {trace.get("name") for trace in one["data"]} >= {"best", "as given", "trials"}
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "default-src 'none'" in page
    assert "http" not in own(page).replace("http-equiv", "")


def test_the_page_says_what_was_found() -> None:
    found = tuned(["luna", "robot"])
    page = landscape(found)
    plain = html.unescape(page)
    best = " + ".join(f"{name}:{scale:.4g}" for name, scale in found.scales.items())
    assert f"<title>{best} – LoRA tuning</title>" in plain
    assert f"<h1>{best}</h1>" in plain
    assert (
        "Of 14 mixtures that were tried this one has the lowest perplexity: 4. The scales as given have 20, the "
        in page
    )
    assert "1 of 14 trials failed" in page
    rows = table(page, "place")
    assert [row["perplexity"] for row in rows[:3]] == ["4", "9", "20"]
    assert [row["luna"] for row in rows[:3]] == [f"{found.scales['luna']:.4g}", "0", "1"]
    (said,) = re.findall(r'role="img" aria-label="(.*?)"', page)
    assert said.startswith("luna and robot: perplexity of 13 mixtures, from 4 to 405; the best is 4 at luna:")
    assert page.count("<caption>") == page.count("<table") == 2
    for trial in found.trials[:-1]:
        assert f"{trial.scales['luna']:.4g}" in cells(page)


def test_a_page_of_very_few_or_equal_trials_is_drawn() -> None:
    trials = (Trial({"a": 1.0, "b": 1.0}, 2.0), Trial({"a": 0.0, "b": 0.0}, 2.0))
    assert '"type":"contour"' in landscape(Tuned((), trials[0].scales, 2.0, 2.0, 2.0, trials, "minimize", "score"))
    for names in ("a", "ab", "abc"):  # one number says it
        only = (Trial(dict.fromkeys(names, 1.0), 2.0),)
        page = landscape(Tuned((), only[0].scales, 2.0, 2.0, 2.0, only, "minimize", "score"))
        assert figures(page) == {}
        assert "score 2 at " in page


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_it_fits_the_screen_and_can_be_read(tab: Browser, tmp_path: Path, count: int) -> None:
    page = tmp_path / "landscape.html"
    for names in (["luna", "robot", "excited"][:count], [f"{n}" + "style" * 12 for n in range(count)]):
        page.write_text(landscape(tuned(names, 30)), "utf-8")
        for width in WIDTHS:
            for dark in (False, True):
                tab.open(page, width, dark)
                assert tab.ask('document.querySelectorAll(".plot .main-svg").length') > 0
                check_width(tab, width)
                least = tab.ask(TEXTS)
                assert least[0][0] >= 4.5, least[:5]
                assert all(one >= 3 for one in tab.ask(LINES))
    assert tab.console == []
