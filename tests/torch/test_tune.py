"""Finding the scales: better than equal weights on real adapters, repeatable, and without a trace on the model."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorastack
from lorastack import LoadedLora, LoraStack, load
from lorastack.cli import main
from lorastack.errors import ArgumentError, MissingDependencyError
from lorastack.report.landscape import landscape
from lorastack.torch import Tuned, attach, tune
from lorastack.torch.generate import load_base
from lorastack.torch.perplexity import Perplexity
from lorastack.torch.search import Search
from tests.conftest import ROOT

TEXTS = (ROOT / "tests" / "fixtures" / "zara_excited.txt").read_text().splitlines()


class Stories(nn.Module):
    """Stands for a model whose score is known: two adapters change one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.dropout = nn.Dropout(0.5)
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.b.weight)

    def forward(self) -> torch.Tensor:
        one = torch.ones(1)
        return torch.cat([self.dropout(self.a(one)), self.dropout(self.b(one))])


def one_weight(name: str) -> LoadedLora:
    return LoadedLora.from_tensors({f"{name}.weight": (np.ones((1, 1)), np.ones((1, 1)))}, name=name)


def closeness(model: Any) -> torch.Tensor:
    """Best at a = 0.7, b = -0.2."""
    return -(model() - torch.tensor([0.7, -0.2])).square().sum()


@pytest.fixture
def pair() -> LoraStack:
    return LoraStack([(one_weight("a"), 1.0), (one_weight("b"), 1.0)])


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Any, Any, Path]:
    model, tokenizer = load_base(str(shared / "stories260k" / "base"), device="cpu")
    return model, tokenizer, shared / "stories260k"


@pytest.fixture(scope="module")
def found(stories: tuple[Any, Any, Path]) -> Tuned:
    model, tokenizer, folder = stories
    stack = LoraStack([(load(folder / "adapters" / name), 1.0) for name in ("excited", "zara")])
    return tune(model, stack, texts=TEXTS, tokenizer=tokenizer, trials=40)


def plain_perplexity(model: Any, tokenizer: Any) -> float:
    """Text by text and token by token, in float64."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            probabilities = model(ids).logits[0].double().softmax(-1)
        losses += [-math.log(probabilities[n, token]) for n, token in enumerate(ids[0, 1:])]
    return math.exp(sum(losses) / len(losses))


# Real adapters


def test_tuned_scales_are_better_than_equal_ones_and_those_than_the_base(found: Tuned) -> None:
    assert found.score < found.equal - 0.3 < found.base - 1.3
    assert found.scales == pytest.approx({"excited": 1.18, "zara": 0.5}, abs=0.06)
    assert found.trials[0] == ({"excited": 1.0, "zara": 1.0}, found.equal)
    assert found.trials[1] == ({"excited": 0.0, "zara": 0.0}, found.base)
    assert found.score == min(trial.score for trial in found.trials)
    assert 20 < len(found.trials) <= 40
    assert (found.measure, found.direction, found.failed) == ("perplexity", "minimize", 0)


def test_the_scores_are_perplexities_computed_plainly(found: Tuned, stories: tuple[Any, Any, Path]) -> None:
    model, tokenizer, _ = stories
    assert plain_perplexity(model, tokenizer) == pytest.approx(found.base, rel=1e-5)
    with attach(model, found.stack):
        assert plain_perplexity(model, tokenizer) == pytest.approx(found.score, rel=1e-5)


def test_no_nearby_mixture_is_better(found: Tuned, stories: tuple[Any, Any, Path]) -> None:
    model, tokenizer, _ = stories
    score = Perplexity(tokenizer, TEXTS)
    with attach(model, found.stack) as handle:
        for name in found.scales:
            for step in (-0.1, 0.1):
                handle.set_scales(found.scales | {name: found.scales[name] + step})
                assert score(model) > found.score


def test_the_same_seed_finds_the_same_and_leaves_no_trace(stories: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = stories
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack = LoraStack([(load(folder / "adapters" / "excited"), 0.5), (load(folder / "adapters" / "zara"), 0.8)])
    runs = [tune(model, stack, texts=TEXTS[:6], tokenizer=tokenizer, trials=20, seed=seed) for seed in (3, 3, 4)]
    assert runs[0].trials == runs[1].trials
    assert runs[0].scales == runs[1].scales
    assert runs[0].trials != runs[2].trials
    assert stack.entries[0][1] == 0.5, "the stack that was given has changed"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_adapters_of_both_namings_are_tuned_side_by_side(stories: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = stories
    entries = [(load(folder / "gguf" / "excited.f32.gguf"), 1.0), (load(folder / "adapters" / "zara"), 1.0)]
    mixed = tune(model, entries, texts=TEXTS[:6], tokenizer=tokenizer, trials=12)
    assert mixed.score < mixed.equal < mixed.base


# Any score


@pytest.mark.parametrize(("direction", "sign"), [(None, 1), ("minimize", -1)])
def test_a_function_with_a_known_best_is_found(pair: LoraStack, direction: Any, sign: int) -> None:
    model = Stories()
    found = tune(model, pair, lambda m: sign * closeness(m), direction=direction)
    assert found.scales == pytest.approx({"a": 0.7, "b": -0.2}, abs=0.02)
    assert found.equal == pytest.approx(-sign * (0.3**2 + 1.2**2))
    assert found.base == pytest.approx(-sign * (0.7**2 + 0.2**2))
    assert [(lora.name, scale) for lora, scale in found.entries] == list(found.scales.items())
    assert found.measure == "score"


def test_dropout_is_off_meanwhile_and_on_again_afterwards(pair: LoraStack) -> None:
    model = Stories()
    model.a.eval()
    seen = []
    tune(model, pair, lambda m: seen.append(any(part.training for part in m.modules())) or 0.0, trials=4)
    assert not any(seen)
    assert [model.training, model.a.training, model.dropout.training] == [True, False, True]


def test_eight_scales_come_close() -> None:
    best = np.linspace(-0.4, 1.4, 8)
    search = Search(
        tuple("abcdefgh"), lambda s: float(((np.array(list(s.values())) - best) ** 2).sum()), 160, -0.5, 1.5
    )
    search.score([1.0] * 8)
    import optuna

    search.explore(optuna, until=100, seed=0)
    explored = search.best.score
    search.refine()
    assert search.best.score < explored / 5
    assert search.best.score < 0.02
    assert len(search.trials) <= 160


def test_a_given_scale_out_of_range_is_scored_and_may_win() -> None:
    stack = LoraStack([(one_weight("a"), 3.0)])
    found = tune(Stories(), stack, lambda m: m()[0], low=0.0, high=1.0, trials=10)
    assert found.scales == {"a": 3.0}
    assert all(0 <= trial.scales["a"] <= 1 for trial in found.trials[1:])


def test_the_same_adapter_twice_has_two_scales() -> None:
    found = tune(Stories(), LoraStack([(one_weight("a"), 1.0)] * 2), lambda m: -(m()[0] - 2.5).abs(), trials=40)
    assert sum(found.scales.values()) == pytest.approx(2.5, abs=0.03)
    assert found.stack.names == tuple(found.scales) == ("a", "a#2")


def test_trials_without_a_finite_score_are_reported_and_never_chosen(pair: LoraStack) -> None:
    def score(model: Any) -> float:
        a, b = model().tolist()
        return math.inf if b > 1.2 else math.nan if a > 0.5 else a + b

    found = tune(Stories(), pair, score, trials=40)
    assert found.scales["a"] <= 0.5
    assert 0 < found.failed < 40
    assert math.isnan(found.equal)
    assert found.score > found.base == 0.0
    assert f"{found.failed} of {len(found.trials)} trials failed" in landscape(found)


def test_an_error_of_the_score_leaves_the_model_free(pair: LoraStack) -> None:
    model = Stories()
    with pytest.raises(ZeroDivisionError):
        tune(model, pair, lambda m: 1 / 0)
    with pytest.raises(ArgumentError, match="the score is NoneType, expected a number"):
        tune(model, pair, lambda m: None)
    with pytest.raises(ArgumentError, match=r"no mixture has a finite score: all \d trials"):
        tune(model, pair, lambda m: math.nan, trials=5)
    attach(model, pair).detach()
    assert model.training


def test_progress_tells_every_trial(pair: LoraStack) -> None:
    told: list[tuple[int, int]] = []
    found = tune(Stories(), pair, closeness, trials=9, progress=lambda done, most: told.append((done, most)))
    assert told == [(n, 9) for n in range(1, len(found.trials) + 1)]


def test_optuna_is_quiet_and_its_logging_as_before(pair: LoraStack, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    tune(Stories(), pair, closeness, trials=12)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


# Bad input


def test_one_error_lists_all_that_is_wrong() -> None:
    with pytest.raises(ArgumentError) as raised:
        tune(Stories(), LoraStack(), trials=2, low=1.0, high=math.inf, direction="up")  # type: ignore[arg-type]
    assert raised.value.problems == (
        "the stack is empty; push an adapter first",
        "there is nothing to score by; give texts with their tokenizer, or a score(model)",
        "trials is 2, expected 3 or more: two go to the stack as given and the base",
        "low is 1.0 and high is inf, expected finite numbers, the first one lower",
        "direction is 'up', expected minimize or maximize",
    )


def test_texts_without_tokenizer_too_short_too_long_or_beside_a_score(stories: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = stories
    stack = LoraStack([(load(folder / "adapters" / "zara"), 1.0)])
    with pytest.raises(ArgumentError, match="texts need the model's tokenizer"):
        tune(model, stack, texts=TEXTS)
    with pytest.raises(ArgumentError, match="texts is one string, expected a list"):
        tune(model, stack, texts="Zara ran!", tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="there is no text"):
        tune(model, stack, texts=[], tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="texts and a score are given"):
        tune(model, stack, lambda m: 0.0, texts=TEXTS, tokenizer=tokenizer)
    with pytest.raises(ArgumentError) as raised:
        tune(model, stack, texts=["", TEXTS[0], "Zara! " * 400], tokenizer=tokenizer)
    assert raised.value.problems[0] == "text 1 ('') has 1 tokens, and the first of a text is not scored; give 2 or more"
    assert re.fullmatch(r"text 3 \('Zara! .*'\.\.\.\) has \d+ tokens, the model takes 512; split it",
                        raised.value.problems[1])  # fmt: skip


def test_adapters_of_the_second_list_are_refused(pair: LoraStack) -> None:
    bottom = "model.layers.0.self_attn.q_proj.weight"
    pair.push_adapter(LoadedLora.from_tensors({bottom: (np.ones((1, 1)), np.ones((1, 1)))}))
    with pytest.raises(ArgumentError, match=r"1 of the stack's adapters were pushed with push_adapter\(\)"):
        tune(Stories(), pair, closeness)


def test_lorastack_tune_is_there_without_importing_torch_before() -> None:
    assert lorastack.tune is tune
    code = "import sys, lorastack; assert 'torch' not in sys.modules; lorastack.tune; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        lorastack.tuna  # noqa: B018


def test_a_missing_library_gives_the_install_line(pair: LoraStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lorastack\[tune\]'"):
        tune(Stories(), pair, closeness)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "lorastack.report.landscape")
    monkeypatch.delitem(sys.modules, "lorastack.report.figures")
    with pytest.raises(MissingDependencyError, match=r"pip install 'lorastack\[report\]'"):
        importlib.import_module("lorastack.report.landscape")


# The command


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lorastack", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_writes_a_recipe_that_bakes_and_a_page(
    stories: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, folder = stories
    (tmp_path / "eval.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "out").mkdir()
    (tmp_path / "loras").symlink_to(folder / "gguf")
    monkeypatch.chdir(tmp_path)
    loras = ["loras/excited.f32.gguf", "loras/zara.f32.gguf:1"]
    words = ["tune", folder / "base", *loras, "--text", "eval.txt", "--trials", 20, "--device", "cpu"]
    assert run(monkeypatch, *words, "-o", "out/best.toml", "--plot", "out/best.html", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["score"] < said["as_given"]["score"] < said["base"]
    assert len(said["trials"]) == 20
    assert '"type":"contour"' in (tmp_path / "out" / "best.html").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(monkeypatch, "bake", "../out/best.toml", "-o", "both.gguf") == 0
    with attach(model, load("both.gguf")):
        assert plain_perplexity(model, tokenizer) == pytest.approx(said["score"], rel=1e-4)


def test_the_command_prints_a_table_and_replaces_only_by_force(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best.toml").write_text("mine")
    words = ["tune", demo / "base", demo / "luna", "--text", demo / "eval.txt", "--trials", 4, "-o"]
    assert run(monkeypatch, *words, tmp_path / "best.toml", "--plot", tmp_path / "x.png") == 1
    error = capsys.readouterr().err
    assert "best.toml exists" in error
    assert "x.png: give it a name that ends with .html" in error
    assert (tmp_path / "best.toml").read_text() == "mine"
    assert run(monkeypatch, *words, tmp_path / "best.toml", "--force", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert [word for word in ("luna", "perplexity", "best", "as given", "base", "4 trials") if word not in out] == []
    assert "[[adapter]]" in (tmp_path / "best.toml").read_text()


def test_the_command_refuses_texts_it_cannot_read(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for file, message in (("empty.txt", "it has no text"), ("missing.txt", "there is no such file")):
        assert run(monkeypatch, "tune", demo / "base", demo / "luna", "--text", tmp_path / file) == 1
        assert message in capsys.readouterr().err
