"""What a release says of itself: one version, a changelog section, fragments that a release would read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import lorastack
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_said_alike_everywhere() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]  # one place: lorastack.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lorastack.__version__
    released = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == lorastack.__version__


def test_what_is_shown_elsewhere_has_absolute_links() -> None:
    found = re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", (ROOT / "README.md").read_text())
    assert [link for pair in found if (link := "".join(pair)) and not link.startswith("https://")] == []


def test_every_fragment_of_news_is_of_a_kind() -> None:
    kinds = "|".join(kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"])
    names = [path.name for path in Path(ROOT / "changes").iterdir()]
    assert [
        name for name in names if name != "README.md" and not re.fullmatch(rf"\+[a-z0-9-]+\.({kinds})\.md", name)
    ] == []


def test_the_checks_of_a_change_test_the_wheel_once() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "LORASTACK_TEST_STRICT=1 make -o build test-wheel" in lines
    assert not any(re.search(r"\bmake test$", line) for line in lines)


def test_the_release_workflow_tests_the_wheel_before_it_is_published() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert any(step.get("run") == "make test-wheel" for step in jobs["build"]["steps"])
    assert jobs["publish"]["needs"] == "build"
