"""Comparisons by several processes, and by Ray: the numbers of one process, whatever happens to a worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load
from lorastack.algebra.compare import compare
from lorastack.algebra.share import Measured, Share
from lorastack.cli.application import app
from lorastack.errors import ArgumentError, LoraStackError, NonFiniteError
from lorastack.fleet import workers
from lorastack.fleet.workers import MOST_LOSSES, processes
from tests.conftest import ROOT
from tests.fleet.engine import program
from tests.fleet.makers import library
from tests.fleet.sweep import WEIGHTS, differing, many


def test_two_processes_give_the_numbers_of_one(demo: Path) -> None:
    stack = many(12)
    seen: list[int] = []
    assert differing(compare(stack), compare(stack, run=processes(2), progress=seen.append)) == []
    assert sum(seen) == len(WEIGHTS)


def test_with_a_base_which_workers_open_themselves(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stack = LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), 0.3)])
    assert differing(compare(stack, demo / "base"), compare(stack, demo / "base", run=processes(2))) == []


def test_what_a_lost_worker_had_is_done_again() -> None:
    stack = many(12)
    killed: list[int] = []

    def run(shares: Iterable[Share]) -> Iterator[Measured]:
        for one in processes(2)(shares):
            yield one
            children = multiprocessing.active_children()
            if len(killed) < 2 and children:
                killed.append(children[0].pid or 0)
                os.kill(killed[-1], signal.SIGKILL)

    assert differing(compare(stack), compare(stack, run=run)) == []
    assert len(killed) == 2


class Deadly:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def test_a_share_that_ends_every_worker_is_an_error_in_the_end() -> None:
    share = Share(0, "w", 1, {0: Deadly()})  # type: ignore[dict-item]
    assert pickle.dumps(share)
    with pytest.raises(LoraStackError, match=rf"w: its worker ended {MOST_LOSSES + 1} times"):
        list(processes(2)([share]))


def test_every_nan_is_named_as_in_one_process() -> None:
    good = many(2)
    bad = np.full((2, 40), np.nan, np.float32), np.ones((48, 2), np.float32)
    weights = list(WEIGHTS)[1:3]
    lora = LoadedLora.from_tensors(dict.fromkeys(weights, bad), name="nan", naming="hf")
    stack = good + lora
    with pytest.raises(NonFiniteError) as here:
        compare(stack)
    with pytest.raises(NonFiniteError) as there:
        compare(stack, run=processes(2))
    assert all(weight in str(there.value) for weight in weights)
    assert sorted(str(here.value).split("\n")) == sorted(str(there.value).split("\n"))


def test_a_model_in_memory_cannot_be_shared() -> None:
    from lorastack.base import BaseModel

    base = BaseModel("live", "hf", None, {}, dict(WEIGHTS))
    with pytest.raises(ArgumentError, match="is a model in memory"):
        compare(many(2), base, run=processes(2))


def test_a_cluster_that_is_not_there_is_an_error_at_once() -> None:
    class Ray:
        """Not asked for more than whether it has begun."""

        @staticmethod
        def is_initialized() -> bool:
            return False

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(LoraStackError, match="there is no Ray cluster at 127"):
            next(workers._on_ray(Ray, [], address))


def test_the_command_takes_workers(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    folder = library(tmp_path / "loras", count=4)
    words = ["compare", str(folder), "--json"]
    alone, shared = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--workers", "2"]))
    assert json.loads(alone.stdout) == json.loads(shared.stdout)
    both = CliRunner().invoke(app, [*words, "--workers", "2", "--ray", "local"])
    assert "two ways to share the work" in str(both.exception)


def test_a_thousand_adapters_by_two_processes() -> None:
    stack = many(1000, rank=2, shapes=dict(list(WEIGHTS.items())[:2]))
    assert differing(compare(stack), compare(stack, run=processes(2))) == []


@pytest.mark.slow
def test_a_thousand_adapters_by_ray() -> None:
    """In the environment that has Ray; both ways there, with the NumPy of that place."""
    done = subprocess.run(
        [str(program("python")), "-m", "tests.fleet.sweep", "1000"],
        capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=f"{ROOT / 'src'}:{ROOT}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("the same")
