"""The built site opens without a network, and every link in it leads somewhere, to an anchor too."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import browser
from tests.conftest import ROOT

#: Tag -> the attributes whose targets a browser fetches by itself.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
#: Links that only say where a page is, and are not fetched.
SAID = {"canonical", "next", "prev", "edit"}


class Page(HTMLParser):
    """What a page fetches, where it leads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        target = given.get(FETCHED.get(tag, ""))
        if target and given.get("rel") not in SAID:
            self.fetched.append(target)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    pytest.importorskip("material")
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_nothing_is_fetched_and_no_link_is_broken(site: Path) -> None:
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    assert len(pages) > 20
    wrong = []
    for path, page in pages.items():
        wrong += [f"{path.name} fetches {url}" for url in page.fetched if urlsplit(url).netloc]
        for url in [*page.links, *page.fetched]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{path.name} leads to {url}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{path.name} leads to {url}, which has no such anchor")
    assert wrong == []


def test_no_style_fetches_anything(site: Path) -> None:
    assert [
        path.name for path in site.rglob("*.css") if "url(http" in path.read_text() or "@import" in path.read_text()
    ] == []


def test_every_page_is_in_the_navigation(site: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f": {path.name}\n" not in text] == []


def test_every_public_name_is_in_the_python_reference(site: Path) -> None:
    import lorastack

    anchors = Page(site / "api.html").anchors
    homes = {name: f"lorastack.{home}.{name}" for name, home in lorastack._HOMES.items()}
    assert [name for name, home in homes.items() if home not in anchors] == []


def test_search_finds_pages_from_a_disk_and_the_network_is_not_asked(site: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(site / "index.html")
        found = tab.ask("""new Promise((done) => {
            const box = document.querySelector("[data-md-component=search-query]");
            document.querySelector("#__search").click();
            box.focus();
            box.value = "intruder";
            const end = Date.now() + 60000;
            const look = () => {
                box.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true, key: "r"}));
                const links = [...document.querySelectorAll(".md-search-result__link")].map((one) => one.href);
                if (links.length || Date.now() > end) done(links); else setTimeout(look, 300);
            };
            setTimeout(look, 300);
        })""")
        assert any("compare.html" in link for link in found), tab.console
        assert tab.console == []
