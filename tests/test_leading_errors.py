"""Errors that lead on: a wrong base in few lines, nearest names, what others call things, and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lorastack import LoadedLora, LoraStack, load
from lorastack.cli.group import COMMANDS
from lorastack.cli.missing import _PACKAGES, require_all
from lorastack.core.dtypes import our_name
from lorastack.errors import ArgumentError, FormatError, LoraStackError, MissingDependencyError, UnknownNameError
from lorastack.hub import _of_address
from tests.conftest import ROOT
from tests.test_cli import Command, lorastack  # noqa: F401

RUN = [sys.executable, "-m", "lorastack"]


@pytest.fixture
def foreign(lorastack: Command) -> Command:  # noqa: F811
    """The command beside ``gpt``, an adapter of another model, and ``gpt.gguf``'s kind of names."""
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors(
        {f"transformer.h.{n}.attn.c_attn.weight": (rng.random((2, 8)), rng.random((24, 2))) for n in range(36)},
        name="gpt", naming="hf",
    )  # fmt: skip
    lora.save("gpt")
    config = Path("gpt/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "gpt2"}))
    return lorastack


HEAD = "0 of 36 weights fit; this adapter says it was trained on gpt2, the base is a LlamaForCausalLM"


@pytest.mark.parametrize(
    "words",
    [
        ["bake", "gpt", "--base", "base", "-o", "out"],
        ["run", "base", "gpt", "-p", "Once"],
        ["bake", "gpt", "--base", "base", "-o", "out.gguf"],
    ],
    ids=["bake", "run", "convert"],
)
def test_a_wrong_base_is_one_line_and_ten(foreign: Command, words: list[str]) -> None:
    said = foreign.fails(*words).splitlines()
    assert sum(HEAD in line for line in said) == 1
    assert len([line for line in said if "transformer.h." in line]) == 10
    assert "and 26 more" in said[-1]


def test_inspect_says_it_in_short_too(foreign: Command) -> None:
    done = foreign("inspect", "gpt", "--base", "base")
    assert done.code == 1
    assert HEAD in done.out
    assert done.out.count("transformer.h.") == 10


def test_what_does_not_fit_is_listed_whole_where_something_does(lorastack: Command) -> None:  # noqa: F811
    good = load("luna")
    rng = np.random.default_rng(0)
    strange = {f"model.layers.{n}.odd.weight": (rng.random((2, 8)), rng.random((8, 2))) for n in range(30, 50)}
    both = {name: (d.a, d.b) for name, d in good.adapters.items()} | strange
    LoadedLora.from_tensors(both, name="half", naming="hf").save("half")
    said = lorastack.fails("bake", "half", "--base", "base", "-o", "out")
    assert said.count(".odd.weight") == 20


def test_what_is_not_there_is_told_with_what_is_near(lorastack: Command) -> None:  # noqa: F811
    assert lorastack.fails("inspect", "lunar").endswith("did you mean luna?\n")
    assert "did you mean excited.gguf?" in lorastack.fails("bake", "excited", "-o", "out")
    assert "did you mean base/config.json" not in lorastack.fails("inspect", "qqqqq")
    assert "did you mean ties@knots" in lorastack.fails("bake", "luna", "-o", "out", "--method", "tie@knots")
    assert "--rank" in lorastack.fails("bake", "luna", "-o", "out", "--rnk", "4", code=2)
    stack = LoraStack([load("luna"), load("robot")])
    with pytest.raises(UnknownNameError, match=r"did you mean robot\?"):
        stack.set_scale("robt", 1.0)


def test_types_may_be_called_as_others_do(lorastack: Command) -> None:  # noqa: F811
    for word, kind in (("fp16", "float16"), ("BF16", "bfloat16"), ("float32", "float32"), ("half", "float16")):
        lorastack.works("bake", "luna", "-o", "out", "--dtype", word, "--force")
        assert load("out").adapters["model.layers.0.self_attn.q_proj.weight"].factors[0].dtype.name == kind
    assert our_name("torch.bfloat16") == "bf16"
    assert "there are f32, f16, bf16" in lorastack.fails("bake", "luna", "-o", "other", "--dtype", "int4")


@pytest.mark.parametrize(
    ("address", "means"),
    [
        ("https://huggingface.co/acme/style", "acme/style"),
        ("https://huggingface.co/acme/style/tree/main", "acme/style@main"),
        ("https://huggingface.co/acme/style/tree/v2/sub/folder", "acme/style/sub/folder@v2"),
        ("https://huggingface.co/acme/style/blob/main/sub/adapter_config.json", "acme/style/sub@main"),
        ("https://hf.co/acme/style/resolve/main/x.gguf?download=true", "acme/style/x.gguf@main"),
        ("acme/style", "acme/style"),
    ],
)
def test_an_address_copied_from_the_hub_is_a_hub_id(address: str, means: str) -> None:
    assert _of_address(address) == means


def test_another_address_is_no_model() -> None:
    for address in ("https://example.org/acme/style", "https://huggingface.co/datasets/acme/style/tree/main"):
        with pytest.raises(FormatError, match=r"it is no address of a model on huggingface\.co"):
            load(address)


def test_a_device_that_is_not_there_is_an_error_of_ours(lorastack: Command) -> None:  # noqa: F811
    import torch

    device = "cuda" if not torch.cuda.is_available() else "cuda:99"
    said = lorastack.fails("run", "base", "-p", "Once", "--device", device)
    assert f"--device '{device}' cannot be used with torch {torch.__version__}" in said
    assert "auto takes the best there is" in said
    assert "Traceback" not in said


def test_a_missing_extra_names_all_that_is_missing_and_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorastack.cli.missing as module

    gone = {"torch", "transformers", "optuna", "plotly"}
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in gone else object())
    with pytest.raises(MissingDependencyError) as caught:
        require_all("tune", "report")
    said = str(caught.value)
    assert "this needs torch and transformers and optuna and plotly, which are not installed" in said
    assert "pip install 'lorastack[report,tune]'" in said
    works = [name for name in COMMANDS if name not in ("run", "tune", "report")]
    assert said.endswith(f"in this installation work: {', '.join(works)}")
    gone.clear()
    require_all(*_PACKAGES)


def test_what_an_extra_brings_is_what_the_package_says() -> None:
    """Each package that a command looks for is one that its extra installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        names = {re.split(r"[<>=\[]", line)[0]: line for line in extras[extra]}
        within = re.findall(r"lorastack\[(.*)\]", names.pop("lorastack", ""))
        return set(names).union(*(brought(one) for line in within for one in line.split(",")))

    assert {extra: set(names) for extra, names in _PACKAGES.items()} == {extra: brought(extra) for extra in _PACKAGES}


def test_who_stops_reading_gets_no_traceback(lorastack: Command) -> None:  # noqa: F811
    for words in (["inspect", "luna", "robot"], ["compare", "luna", "robot", "--json"], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([*RUN, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert done.stderr == "", words
        assert done.returncode in (141, 1), words


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_said(lorastack: Command, unbuffered: str) -> None:  # noqa: F811
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*RUN, "inspect", "luna"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


@pytest.mark.parametrize("after", [0.05, 0.15, 0.3, 0.6, 1.0])
def test_an_interrupt_at_any_moment_gives_no_traceback(lorastack: Command, after: float) -> None:  # noqa: F811
    """But for the first moments, in which Python itself starts and nothing of ours runs yet."""
    code = "from lorastack.cli import main; print('started', flush=True); main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "base", "luna", "-p", "Once upon a time", "-n", "400"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode in (130, -signal.SIGINT, 0)


def test_errors_of_python_stay_errors_of_ours() -> None:
    with pytest.raises(ArgumentError):
        LoraStack([("a", 1.0)])  # type: ignore[list-item]
    assert issubclass(MissingDependencyError, LoraStackError)
