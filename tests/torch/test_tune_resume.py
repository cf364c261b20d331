"""A search that was stopped keeps its best, and goes on from its file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from lorastack import LoraStack, load
from lorastack.errors import ArgumentError
from lorastack.torch import tune
from tests.torch.test_tune import Stories, closeness, one_weight

PAIR = [(one_weight("a"), 1.0), (one_weight("b"), 1.0)]


def counted(calls: list[int], stop_at: int = 10**9) -> Callable[[Any], torch.Tensor]:
    """`closeness` that counts its calls, and is interrupted at one of them as by Ctrl-C."""

    def score(model: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return closeness(model)

    return score


def test_an_interrupt_keeps_the_best_where_that_was_asked_for(tmp_path: Path) -> None:
    calls: list[int] = []
    model = Stories()
    found = tune(model, PAIR, counted(calls, 9), trials=30, keep_best=True)
    assert found.stopped
    assert len(found.trials) == 8
    assert found.score == max(trial.score for trial in found.trials)
    assert not model.a._forward_hooks
    assert model.training
    with pytest.raises(KeyboardInterrupt):
        tune(model, PAIR, counted([], 9), trials=30)
    with pytest.raises(KeyboardInterrupt):  # there is no best yet
        tune(model, PAIR, counted([], 2), trials=30, keep_best=True)


def test_a_stopped_search_goes_on_from_its_file_and_scores_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "search.log"
    first: list[int] = []
    stopped = tune(Stories(), PAIR, counted(first, 13), trials=40, keep_best=True, resume=file)
    second: list[int] = []
    found = tune(Stories(), PAIR, counted(second), trials=40, keep_best=True, resume=file)
    assert not found.stopped
    assert found.trials[: len(stopped.trials)] == stopped.trials
    assert len(stopped.trials) + len(second) == len(found.trials) <= 40
    assert found.score >= stopped.score
    assert abs(found.scales["a"] - 0.7) < 0.05
    third: list[int] = []
    again = tune(Stories(), PAIR, counted(third), trials=len(found.trials), resume=file)
    assert (third, again.scales) == ([], found.scales)


def test_the_file_is_optunas_own(tmp_path: Path) -> None:
    file = tmp_path / "search.log"
    found = tune(Stories(), PAIR, closeness, trials=12, resume=file)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    study = optuna.load_study(storage=storage, study_name="lorastack")
    assert [trial.user_attrs["scales"] for trial in study.trials] == [dict(trial.scales) for trial in found.trials]
    assert max(trial.value for trial in study.trials if trial.value is not None) == found.score


def test_failed_trials_are_kept_as_such(tmp_path: Path) -> None:
    def sometimes(model: Any) -> float:
        value = float(closeness(model))
        return value if value > -1 else float("nan")

    file = tmp_path / "search.log"
    one = tune(Stories(), PAIR, sometimes, trials=20, resume=file)
    two = tune(Stories(), PAIR, sometimes, trials=20, resume=file)
    assert one.failed == two.failed > 0
    assert one.scales == two.scales


def test_another_search_is_refused_with_what_is_another(tmp_path: Path) -> None:
    file = tmp_path / "search.log"
    tune(Stories(), PAIR, closeness, trials=5, resume=file)
    with pytest.raises(ArgumentError, match="it holds another search") as caught:
        tune(Stories(), PAIR[:1], closeness, trials=5, resume=file)
    assert any(line.startswith("adapters: ") for line in caught.value.problems)
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    with pytest.raises(ArgumentError, match="it is no study of Optuna's"):
        tune(Stories(), PAIR, closeness, trials=5, resume=other)
    assert other.read_text() == "my notes\n"
    with pytest.raises(ArgumentError, match="it is a folder, expected a file"):
        tune(Stories(), PAIR, closeness, trials=5, resume=tmp_path)


def _read_to_the_end(descriptor: int, into: bytearray) -> None:
    """What a terminal shows while it is shown: it takes no more where nobody reads."""
    with contextlib.suppress(OSError):  # what Linux says where the other end is closed
        while part := os.read(descriptor, 1 << 16):
            into += part


def test_ctrl_c_writes_the_best_and_the_command_goes_on(demo: Path, tmp_path: Path) -> None:
    """In a terminal of its own, as a user would: Ctrl-C while it searches, then again to the end."""
    words = [sys.executable, "-m", "lorastack", "tune", str(demo / "base"), str(demo / "luna"), str(demo / "robot"),
             "--text", str(demo / "eval.txt"), "--resume", "search.log", "-o", "best.toml", "--json"]  # fmt: skip
    here, there = pty.openpty()
    shown = bytearray()
    reader = threading.Thread(target=_read_to_the_end, args=(here, shown))
    reader.start()
    with subprocess.Popen(
        [*words, "--trials", "5000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=there, text=True
    ) as process:
        file = tmp_path / "search.log"
        until = time.monotonic() + 120
        while time.monotonic() < until and (not file.exists() or file.read_text().count('"scales"') < 12):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    os.close(there)
    reader.join(60)
    os.close(here)
    said, words_shown = json.loads(out), shown.decode()
    assert process.returncode == 130, words_shown
    assert said["stopped"]
    assert "Traceback" not in words_shown
    assert f"stopped after {len(said['trials'])} of 5000 trials; --resume search.log goes on from here" in words_shown
    scales = {lora.name: scale for lora, scale in LoraStack(load_entries(tmp_path / "best.toml"))}
    assert scales == {name: scale for name, scale in said["scales"].items() if name in scales}
    count = len(said["trials"]) + 3
    done = subprocess.run(
        [*words, "--trials", str(count), "--force"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    again = json.loads(done.stdout)
    assert again["trials"][: count - 3] == said["trials"]
    assert len(again["trials"]) <= count
    assert load(tmp_path / "best.toml").rank


def load_entries(recipe: Path) -> list[Any]:
    from lorastack.recipe import Recipe

    return list(Recipe.read(recipe).stack().entries)
