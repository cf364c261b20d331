"""Models whose tensors have several names: what is extracted does what the fine-tune does, attached and merged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorastack import extract, load, merge
from lorastack.errors import FormatError, UnsupportedError
from lorastack.formats.safetensors_save import write_safetensors
from lorastack.torch import attach
from tests.merge.test_ties import FAST, MODELS, far, output

#: An embedding that two stacks share takes one update in files.
LIVE_ONLY = {("bart", True), ("t5", True)}


@pytest.mark.parametrize("embeddings", [False, True], ids=["saved whole", "low-rank"])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_all_that_changed_comes_back(name: str, embeddings: bool, tmp_path: Path) -> None:
    how = MODELS[name]
    torch.manual_seed(0)
    base = how.make().eval()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    expected = output(tuned, how.inputs)
    lora = extract(tmp_path / "tuned", tmp_path / "base", rank=64, save_rest=True, embeddings=embeddings)
    assert far(output(base, how.inputs), expected) > 0.1
    with attach(base, load(lora.save(tmp_path / "adapter"))):
        assert far(output(base, how.inputs), expected) < 1e-5
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")  # type: ignore[arg-type]
    assert far(output(peft.eval(), how.inputs), expected) < 1e-5
    if (name, embeddings) in LIVE_ONLY:
        with pytest.raises(UnsupportedError, match="is one tensor with"):
            merge(tmp_path / "base", lora, tmp_path / "merged")
        return
    merge(tmp_path / "base", lora, tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    assert far(output(merged, how.inputs), expected) < 1e-5


def test_no_file_gets_two_tensors_of_one_name(tmp_path: Path) -> None:
    one = ("a", (2,), "f32", lambda: torch.ones(2).numpy())
    with pytest.raises(FormatError, match="two tensors a"):
        write_safetensors(tmp_path / "x.safetensors", [one, one], {})
    assert list(tmp_path.iterdir()) == []
