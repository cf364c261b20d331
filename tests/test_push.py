"""What reaches the hub: a folder that PEFT reads, a card with the mixture, and no path of this machine.

The two calls that reach the network are caught, and the folder looked at as it would be sent.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import orjson
import pytest
import yaml

from lorastack import LoraStack, load
from lorastack.cli import main
from lorastack.errors import ArgumentError
from lorastack.pushing import PushError


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def upload(self: object, *, repo_id: str, folder_path: Path, **given: Any) -> None:
        shutil.copytree(folder_path, tmp_path / "sent")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *given, **how: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return tmp_path / "sent"


def test_the_folder_is_the_mixture_and_says_no_path(sent: Path, demo: Path) -> None:
    stack = LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), 0.3)])
    assert stack.bake(name="both").push_to_hub("acme/both") == "https://huggingface.co/acme/both"
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = sum(s * d.scaling * np.float64(d.b) @ np.float64(d.a) for s, d in stack.terms(name))
    delta = load(sent).adapters[name]
    np.testing.assert_allclose(delta.scaling * np.float64(delta.b) @ np.float64(delta.a), expected, atol=1e-6)
    text = (sent / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    assert "| luna | 0.7 |\n| robot | 0.3 |" in text
    assert {"README.md", "norms-1.svg", "conflict-1-2.svg"} < {file.name for file in sent.rglob("*")}
    for file in (path for path in sent.rglob("*") if path.is_file()):
        assert str(demo).encode() not in file.read_bytes()


def test_the_card_is_that_which_save_writes_but_for_where_to_load_from(sent: Path, demo: Path, tmp_path: Path) -> None:
    baked = LoraStack([(load(demo / "luna"), 0.7), (load(demo / "robot"), 0.3)]).bake(name="both", rank=4)
    baked.push_to_hub("acme/both")
    saved = baked.save(tmp_path / "saved", recipe=False, figures=True)
    pushed, written = ((folder / "README.md").read_text().splitlines()[:-1] for folder in (sent, saved))
    assert 'model = PeftModel.from_pretrained(model, "acme/both")' in pushed
    assert [line.replace("acme/both", "path/of/this/folder") for line in pushed] == written


@pytest.mark.parametrize(("said", "kept"), [("acme/base", "acme/base"), ("/models/base", None), ("../acme/base", None)])
def test_only_an_id_of_the_hub_is_the_base(sent: Path, demo: Path, tmp_path: Path, said: str, kept: str | None) -> None:
    shutil.copytree(demo / "luna", tmp_path / "luna")
    config = tmp_path / "luna" / "adapter_config.json"
    config.write_bytes(orjson.dumps(orjson.loads(config.read_bytes()) | {"base_model_name_or_path": said}))
    load(tmp_path / "luna").push_to_hub("acme/luna")
    assert orjson.loads((sent / "adapter_config.json").read_bytes()).get("base_model_name_or_path") == kept
    assert yaml.safe_load((sent / "README.md").read_text().split("---")[1]).get("base_model") == kept


def test_what_cannot_be_pushed_is_said(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="'luna' is no repository; write owner/name"):
        load(demo / "luna").push_to_hub("luna")

    def refuse(*given: object, **how: object) -> None:
        raise ValueError("401: who are you")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(PushError, match="acme/luna: the hub did not take luna: 401: who are you"):
        load(demo / "luna").push_to_hub("acme/luna")


def test_figures_are_drawn_for_a_pushed_card_where_they_can_be(
    sent: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pushed(*words: str) -> tuple[int, str]:
        shutil.rmtree(sent, ignore_errors=True)
        monkeypatch.setattr("sys.argv", ["lorastack", "push", str(demo / "luna"), "--to", "acme/luna", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    for words in ((), ("--figures",)):
        assert pushed(*words) == (0, "pushed 28 weights of rank 8 to https://huggingface.co/acme/luna\n")
        assert "](figures/norms-1.svg)" in (sent / "README.md").read_text()
        assert (sent / "figures/norms-1.svg").exists()
    assert pushed("--no-figures")[0] == 0
    assert not (sent / "figures").exists()

    monkeypatch.setitem(sys.modules, "plotly", None)
    code, said = pushed()
    assert code == 0
    assert said.startswith(
        "the card has no figures: plotly draws them, which `pip install 'lorastack[report]'` brings\n"
    )
    assert sorted(path.name for path in sent.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    assert pushed("--no-figures") == (0, "pushed 28 weights of rank 8 to https://huggingface.co/acme/luna\n")
    code, said = pushed("--figures")
    assert code == 1
    assert "pip install 'lorastack[report]'" in said
    assert not sent.exists()
