"""Names of mixtures: one grammar, one canonical spelling, and a fingerprint that tells content, scales and way."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack import LoadedLora, LoraStack, load
from lorastack.errors import ArgumentError, UnknownNameError
from lorastack.formats import opened
from lorastack.mixture import MAX_PARTS, Mixture
from tests.fleet.makers import adapter

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
SCALES = st.decimals(min_value=-100, max_value=100, places=4).map(lambda d: format(d, "f"))
PARTS = st.lists(st.tuples(NAMES, SCALES), min_size=1, max_size=MAX_PARTS)


@given(PARTS, st.randoms())
def test_every_spelling_is_one_mixture(parts: list[tuple[str, str]], random: object) -> None:
    exact: dict[str, Fraction] = {}
    for name, scale in parts:
        exact[name] = exact.get(name, Fraction(0)) + Fraction(Decimal(scale))
    text = "+".join(f"{name}:{scale}" for name, scale in parts)
    if not any(exact.values()):
        with pytest.raises(ArgumentError, match="ask for the base"):
            Mixture.parse(text)
        return
    mixture = Mixture.parse(text)
    assert mixture.scales == tuple((name, float(scale)) for name, scale in sorted(exact.items()) if scale)
    assert Mixture.parse(str(mixture)) == mixture
    assert "e" not in "".join(part.partition(":")[2] for part in str(mixture).split("+"))
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert str(Mixture.parse("+".join(f"{name}:{scale}000" for name, scale in shuffled))) == str(mixture)


@pytest.mark.parametrize(("text", "canonical"), [
    ("zara", "zara:1"), ("zara:0.70+excited:.3", "excited:0.3+zara:0.7"), ("a:1.+a", "a:2"), ("a:-0.5", "a:-0.5"),
    ("a:0.1+a:0.2", "a:0.3"), ("b:0+a", "a:1"), ("a:0.00001", "a:0.00001"), ("9.x_-:2", "9.x_-:2"),
])  # fmt: skip
def test_the_canonical_spelling(text: str, canonical: str) -> None:
    assert str(Mixture.parse(text)) == canonical


@pytest.mark.parametrize("text", [
    "", "+", "a+", "a:", "a:1e3", "a:+1", "a:nan", "a:inf", "a:0x1", "../a", "a/b", ".a", "-a", "a b", "a:1:2", "a\n",
    "a:١", "é", "a:1_0", "a" * 2000, "a:.", "a:-", "\0",
])  # fmt: skip
def test_what_is_no_mixture_has_no_name(text: str) -> None:
    with pytest.raises(UnknownNameError, match="is no mixture"):
        Mixture.parse(text)


def test_nine_parts_and_scales_beyond_a_float_cannot_be_held() -> None:
    with pytest.raises(ArgumentError, match="has 9 adapters, a mixture has at most 8"):
        Mixture.parse("+".join(f"a{n}" for n in range(9)))
    assert len(Mixture.parse("+".join(f"a{n}" for n in range(8))).scales) == 8
    with pytest.raises(ArgumentError, match="the scale of a is larger than a float holds"):
        Mixture.parse("a:" + "9" * 400)


def test_a_fingerprint_is_of_content_scales_and_way(tmp_path: Path) -> None:
    first, second = (load(adapter(n).save(tmp_path / f"a{n}")) for n in (1, 2))
    one = LoraStack([(first, 0.7), (second, 0.3)]).fingerprint()
    moved = load(adapter(1).save(tmp_path / "elsewhere", recipe=False).rename(tmp_path / "moved"))
    plain = LoraStack([(load(adapter(1).save(tmp_path / "p", recipe=False)), 1.0)])
    assert LoraStack([(moved, 1.0)]).fingerprint() == plain.fingerprint()
    others = [
        LoraStack([(first, 0.7), (second, 0.31)]).fingerprint(),
        LoraStack([(second, 0.7), (first, 0.3)]).fingerprint(),
        LoraStack([(first.scaled({"*": 0.5}), 0.7), (second, 0.3)]).fingerprint(),
        LoraStack([(first, 0.7), (second, 0.3)]).fingerprint(rank=8),
        LoraStack([(first, 0.7)]).fingerprint(),
    ]
    assert LoraStack([(first, 0.7), (second, 0.3)]).fingerprint() == one
    assert len({one, *others}) == 6
    assert LoraStack([LoraStack([(first, 0.7), (second, 0.3)]).bake()]).fingerprint() == one  # the same sum


def test_a_fingerprint_of_what_is_in_memory_is_of_its_numbers() -> None:
    def of(value: float, alpha: float = 4) -> str:
        pair = np.full((2, 6), value, np.float32), np.ones((4, 2), np.float32)
        return LoraStack([LoadedLora.from_tensors({"w": pair}, alpha=alpha)]).fingerprint()

    assert of(1.0) == of(1.0)
    assert len({of(1.0), of(2.0), of(1.0, 8)}) == 3


def test_a_file_is_hashed_once_in_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    fill = opened._fill
    monkeypatch.setattr(opened, "_fill", lambda d, room, at: (read.append(len(room)), fill(d, room, at))[1])
    path = adapter(3).save(tmp_path / "a")
    first = LoraStack([load(path)]).fingerprint()
    size = sum(read)
    read.clear()
    assert LoraStack([load(path)]).fingerprint() == first
    assert sum(read) < size / 2
    adapter(4).save(path, force=True)
    assert LoraStack([load(path)]).fingerprint() != first
