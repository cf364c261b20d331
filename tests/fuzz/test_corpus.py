"""Every input that ever got through, through the same readers with the same checks: the first tests that run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import corpus
from tests.fuzz.guard import Finding, answer, workplace
from tests.fuzz.targets import TARGETS


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """No hub is asked, whatever the machine says."""
    import huggingface_hub.constants as client

    before, client.HF_HUB_OFFLINE = client.HF_HUB_OFFLINE, True
    yield
    client.HF_HUB_OFFLINE = before


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_of_the_corpus_gets_through_again(target: str) -> None:
    if target == "pickled":
        pytest.importorskip("torch")
    found = []
    with workplace() as empty:
        for seed in TARGETS[target].seeds():  # imports and caches take memory that is no input's fault
            answer(TARGETS[target].work, seed, empty())
        for name, make in corpus.every(target).items():
            try:
                answer(TARGETS[target].work, make(), empty())
            except Finding as finding:
                found.append(f"{target}/{name}: {finding}")
    assert not found, "\n".join(found)


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    folders = [path.name for path in corpus.HERE.iterdir()]
    assert set(folders) <= set(TARGETS)
    sizes = [path.stat().st_size for target in folders for path in corpus.files(target)]
    assert sum(sizes) < 200_000
    assert len(sizes) >= 90
