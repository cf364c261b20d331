"""Hub ids, found by the real huggingface_hub client in a cache, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

PROGRAM = """
import json, sys
from lorastack import load, LoraStackError
answers = []
for given, options in json.loads(sys.argv[1]):
    try:
        lora = load(given, **options)
        answers.append([lora.name, lora.get("q_proj.weight").dense().tolist() if lora.naming == "hf" else lora.naming])
    except LoraStackError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def peft(folder: Path, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.q_proj.lora_{}.weight"
    factors = {name.format("A"): np.full((1, 1), value, np.float32), name.format("B"): np.ones((1, 1), np.float32)}
    save_file(factors, folder / "adapter_model.safetensors")


def adapter_gguf(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for part in "ab":
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as the client leaves it: models--owner--name/{refs,snapshots}."""
    home = tmp_path_factory.mktemp("hf")

    def repository(name: str, refs: dict[str, str]) -> Path:
        root = home / "hub" / f"models--acme--{name}"
        for ref, commit in refs.items():
            (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (root / "refs" / ref).write_text(commit)
        return root / "snapshots"

    tale = repository("tale", {"main": MAIN, "v1.0": OLD, "refs/pr/3": OLD})
    peft(tale / MAIN, 1.0)
    peft(tale / OLD, 2.0)
    many = repository("many", {"main": MAIN, "old": OLD})
    peft(many / MAIN / "style", 3.0)
    peft(many / MAIN / "deep" / "er", 4.0)
    peft(many / OLD / "style", 5.0)
    adapter_gguf(repository("one-file", {"main": MAIN}) / MAIN / "adapter-f16.gguf")
    for part in ("a", "b"):
        adapter_gguf(repository("two-files", {"main": MAIN}) / MAIN / f"{part}.gguf")
    model = repository("model", {"main": MAIN}) / MAIN
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    return home


def answers(cache: Path, cwd: Path, *asked: str | tuple[str, dict[str, Any]]) -> list[list[Any]]:
    """What a fresh offline process gets for these ids: the client reads its environment at import."""
    wanted = [item if isinstance(item, tuple) else (item, {}) for item in asked]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(wanted)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_an_id_is_its_main_revision_and_named_as_the_repository(cache: Path, tmp_path: Path) -> None:
    assert answers(cache, tmp_path, "acme/tale", ("acme/tale", {"name": "other"})) == [
        ["tale", [[1.0]]],
        ["other", [[1.0]]],
    ]


def test_a_revision_is_a_tag_a_commit_or_a_pull_request(cache: Path, tmp_path: Path) -> None:
    asked = [f"acme/tale@{revision}" for revision in ("v1.0", OLD, MAIN, "refs/pr/3", "main")]
    assert answers(cache, tmp_path, *asked) == [["tale", [[value]]] for value in (2.0, 2.0, 1.0, 2.0, 1.0)]


def test_a_folder_inside_is_named_as_the_folder(cache: Path, tmp_path: Path) -> None:
    assert answers(
        cache,
        tmp_path,
        "acme/many/style",
        "acme/many/deep/er",
        ("acme/many", {"subfolder": "style"}),
        ("acme/many/deep", {"subfolder": "er"}),
        "acme/many/style@old",
        ("acme/many@old", {"subfolder": "style"}),
    ) == [
        ["style", [[3.0]]],
        ["er", [[4.0]]],
        ["style", [[3.0]]],
        ["er", [[4.0]]],
        ["style", [[5.0]]],
        ["style", [[5.0]]],
    ]


def test_an_address_copied_from_a_browser_is_what_it_shows(cache: Path, tmp_path: Path) -> None:
    asked = {
        "https://huggingface.co/acme/tale": ["tale", [[1.0]]],
        "https://huggingface.co/acme/tale/tree/v1.0": ["tale", [[2.0]]],
        "https://hf.co/acme/tale/blob/main/adapter_model.safetensors": ["tale", [[1.0]]],
        "https://huggingface.co/acme/many/tree/main/deep/er": ["er", [[4.0]]],
        "https://huggingface.co/acme/many/blob/old/style/adapter_config.json?x=1": ["style", [[5.0]]],
        "https://huggingface.co/acme/one-file/blob/main/adapter-f16.gguf": ["adapter-f16", "gguf"],
        "https://huggingface.co/acme/one-file/resolve/main/adapter-f16.gguf?download=true": ["adapter-f16", "gguf"],
    }
    assert answers(cache, tmp_path, *asked) == list(asked.values())


def test_the_only_adapter_of_a_repository_is_found_in_its_folder(cache: Path, tmp_path: Path) -> None:
    assert answers(cache, tmp_path, "acme/many@old") == [["style", [[5.0]]]]


def test_a_repository_of_several_adapters_lists_them(cache: Path, tmp_path: Path) -> None:
    [(kind, text)] = answers(cache, tmp_path, "acme/many")
    assert kind == "FormatError"
    assert "it holds several adapters; load one of them" in text
    assert "style" in text
    assert "deep/er" in text


def test_a_single_gguf_file_is_the_adapter_and_two_are_listed(cache: Path, tmp_path: Path) -> None:
    one, (kind, text) = answers(cache, tmp_path, "acme/one-file", "acme/two-files")
    assert one == ["one-file", "gguf"]
    assert kind == "FormatError"
    assert "it holds several adapters; load one of them" in text
    assert "a.gguf" in text
    assert "b.gguf" in text


def test_a_whole_model_is_refused(cache: Path, tmp_path: Path) -> None:
    [(kind, text)] = answers(cache, tmp_path, "acme/model")
    assert kind == "FormatError"
    assert "it is a whole model" in text
    assert "give it as the base" in text


def test_what_is_not_there_says_so_with_the_id(cache: Path, tmp_path: Path) -> None:
    asked = ["acme/missing", "acme/tale@nope", "acme/missing/style", "acme/many/none"]
    repository, revision, inside, folder = answers(cache, tmp_path, *asked)
    assert {kind for kind, _ in (repository, revision, inside, folder)} == {"FormatError"}
    assert (
        "acme/missing: there is no such file or folder here, and the hub repository acme/missing cannot be had"
        in (repository[1])
    )
    assert "the hub repository acme/tale@nope cannot be had" in revision[1]
    assert "acme/missing/style: there is no such file or folder here" in inside[1]
    assert "has no none; it has deep, style" in folder[1]


def test_what_is_no_id_never_reaches_the_hub(cache: Path, tmp_path: Path) -> None:
    asked = [
        "tale",
        "./acme/tale",
        "/acme/tale",
        "~/acme/tale",
        "acme/tale/x.gguf",
        "acme/../tale",
        "acme/tale@",
        "a b/c",
    ]
    for given, (kind, text) in zip(asked, answers(cache, tmp_path, *asked), strict=True):
        assert kind == "FormatError"
        assert text == f"{given}: there is no such file or folder"


def test_a_folder_here_comes_before_a_repository_of_the_same_name(cache: Path, tmp_path: Path) -> None:
    peft(tmp_path / "acme" / "tale", 9.0)
    assert answers(cache, tmp_path, "acme/tale", ("acme", {"subfolder": "tale"})) == [["tale", [[9.0]]]] * 2
