"""Patterns over names: Python's and PEFT's own meaning, in linear time, or an error after a moment."""

from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest

from lorastack import LoadedLora
from lorastack.core.patterns import SECONDS, Allowance, Expression, FirstMatch, Matcher, PatternError, PatternTable
from lorastack.errors import FormatError
from lorastack.formats.peft_save import pattern_key

NAMES = ["a", "b", "ab", "aab", "a.b", "a.1", "b-a", "a_b.b1", "model.layers.10.a", "ä", "aß1", "a b", "aB", "", "a,b"]
#: Expressions that keep a backtracking matcher busy for ever, and a name that shows it.
BOMBS = ["(a+)+b", "(a|a)*b", "(a|aa)+b", "([a-z]+)*=", "(.*.*)*=", "(?:a?){30}a{30}b", "(a*)*b", "(x+x+)+y|(a+)+b"]
#: Likewise, with what RE2 refuses.
BACKTRACKING = [r"(?=a)((a|aa)+)+b", r"(?=a)(a|aa)+b", r"(a|a)(?:a|\1)*b", "(?i)(a|a)*b"]
BUSY = "a" * 60 + "!ab"


def peft_rule(keys: dict[str, int], name: str) -> int | None:
    """peft.utils.get_pattern_key, in its own words."""
    return next((value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def compiles(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except (re.error, OverflowError):
        return False


def random_text(random_: random.Random, parts: list[str], most: int) -> str:
    return "".join(random_.choice(parts) for _ in range(random_.randint(1, most)))


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_random_expressions_mean_what_they_mean_to_python() -> None:
    parts = [*"ab.1-_ ,*+?()[]|^$", r"\.", r"\d", r"\w", r"\b", "a{2}", "{1,2}", "{,2}", "[^a]", "[a-b]", "(?:", "(?i)",
             "(?=a)", r"\1", r"\Z", r"\A", "++", "[[:alpha:]]", r"\z", "ä", r"[\w.]"]  # fmt: skip
    random_, tried = random.Random(4), 0
    for _ in range(6000):
        text = random_text(random_, parts, 6)
        if re.search(r"(\$|\^|\\b)[*+?{]", text):  # a repeated anchor, which RE2 takes and Python does not
            continue
        if not compiles(text) or "[[:" in text:  # which Python itself warns of
            with pytest.raises(PatternError, match="no regular expression"):
                Matcher("re:" + text)
            continue
        expression, tried = Expression(text, Allowance(60)), tried + 1
        for name in NAMES:
            assert expression.hits(name) == (re.fullmatch(text, name) is not None), (text, name)
    assert tried > 2000


def test_random_tables_follow_the_rule_of_peft() -> None:
    parts = ["a", "b", "1", ".", "_", "-", "^", "$", r"\.", r"\-", "layers", ".*", "[ab]", "(a|b)", "|", ")|(", r"\d+"]
    random_ = random.Random(7)
    hits = 0
    for _ in range(3000):
        texts = {random_text(random_, parts, 4) for _ in range(5)}
        keys = {text: n for n, text in enumerate(sorted(texts)) if compiles(rf"(.*\.)?({text})$")}
        table = PatternTable(keys)
        assert table.bad == {}
        for _ in range(8):
            name = random_text(random_, ["a", "b", "1", ".", "_", "-", "layers", "ab"], 5)
            assert table.first(name, None) == peft_rule(keys, name), (keys, name)  # type: ignore[arg-type]
            hits += table.first(name, -1) != -1
    assert hits > 3000


def test_the_table_agrees_with_peft_itself() -> None:
    peft = pytest.importorskip("peft.utils.other")
    keys = {
        "q_proj": 1,
        r"layers.1.mlp.*": 2,
        r"^model\.layers\.2\.self_attn\.k_proj": 3,
        "layers.10.self_attn.k_proj": 4,
    }
    table = PatternTable(keys)
    for name in ("model.layers.2.self_attn.k_proj", "x.model.layers.2.self_attn.k_proj", "model.layers.1.mlp.up_proj",
                 "model.layers.10.self_attn.k_proj", "model.q_proj", "k_proj"):  # fmt: skip
        assert table.first(name, None) == keys.get(peft.get_pattern_key(keys, name))  # type: ignore[arg-type]


def test_keys_that_save_writes_are_looked_up() -> None:
    names = [f"model.layers.{n}.mlp.experts.{n % 64}.up_proj" for n in range(20_000)]
    table = PatternTable({pattern_key(name): n for n, name in enumerate(names)})
    assert not table._others
    assert [table.first(name, None) for name in names] == list(range(20_000))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", BOMBS)
def test_a_bomb_is_matched_in_linear_time(text: str) -> None:
    assert not Expression(text, Allowance()).hits(BUSY * 100)
    assert PatternTable({text: 1}).first(BUSY, 0) == 0


@pytest.mark.parametrize("text", BACKTRACKING)
def test_a_bomb_that_needs_backtracking_ends_in_an_error(text: str) -> None:
    before = time.thread_time()
    with pytest.raises(PatternError, match=r"pattern 're:.*take more than 2 s"):
        Matcher("re:" + text)(BUSY)
    if not text.startswith("(?i)") and r"\1" not in text:  # which mean something else inside PEFT's rule
        with pytest.raises(FormatError, match=r"module 'aaa.*take more than 2 s"):
            PatternTable({text: 1}).first(BUSY, 0)
    assert time.thread_time() - before < 4 * SECONDS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a{99999999999999999999}", "no regular expression"),
        ("(" * 4000 + r"\1" + ")" * 4000, "no regular expression"),
        ("(" * 20000 + ")" * 20000, "40,000 characters"),
        ("a" * 9000 + "(", "no regular expression"),
        ("(?P<a", "no regular expression"),
    ],
)
def test_what_cannot_be_read_says_so(text: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        Matcher("re:" + text)
    assert list(PatternTable({text: 1}).bad) == [text]


def test_many_slow_keys_stop_after_a_moment() -> None:
    before = time.thread_time()
    # Each takes a millisecond or more, on whatever machine, and none repeats more than may be.
    table = PatternTable({f"[a-z\u0100-\uffff]{{1,{900 + n % 100}}}{n}": 4 for n in range(20_000)})
    assert 0 < len(table.bad) < 20
    assert time.thread_time() - before < 4 * SECONDS


def test_many_plain_keys_take_no_time() -> None:
    table = PatternTable({f"z{n}": 4 for n in range(20_000)})
    assert all(table.first(f"m{n}", 0) == 0 for n in range(5_000))


def test_globs_are_linear_and_mean_what_they_did() -> None:
    assert not Matcher("*a" * 4000 + "*b")("a" * 5000)
    assert [Matcher("a[!b]*?")(name) for name in ("acd", "abd", "ac")] == [True, False, False]


def test_a_compiled_expression_is_the_callers_own() -> None:
    assert Matcher(re.compile(r"A\.(.)\1", re.IGNORECASE))("a.bb")


def test_the_first_of_several_counts() -> None:
    patterns = FirstMatch(["b", "a*", "ab", "re:a.*c", "*"])
    assert [patterns.first(name) for name in ("b", "ab", "c")] == [0, 1, 4]
    assert patterns.without_hit({"b": 1, "ab": 1}) == ["re:a.*c"]


def test_select_and_scaled_use_them() -> None:
    pair = (np.ones((1, 2)), np.ones((2, 1)))
    lora = LoadedLora.from_tensors({BUSY: pair, "w": pair})
    assert list(lora.select("re:(a+)+!ab").adapters) == [BUSY]
    with pytest.raises(PatternError, match="take more than 2 s"):
        lora.select(r"re:(?=a)(a|aa)+b")
    with pytest.raises(PatternError, match="no regular expression"):
        lora.scaled({"re:(": 2.0})
    assert [d.scaling for d in lora.scaled({"w": 3.0, "re:(a+)+!ab": 2.0}).adapters.values()] == [2.0, 3.0]
