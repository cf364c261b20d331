"""Adapters of every listed architecture in the real llama.cpp, on tiny models that its own converter wrote.

The truth is the transformers model with the changes added to its weights, densely.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lorastack import LoadedLora, LoraDelta, convert_names
from lorastack.base import open_base
from lorastack.formats.gguf_left_out import left_out
from tests.fixtures.make_architectures import FIXTURE, fetched, model_of, saved, write_gguf
from tests.test_architectures import SAID, base_of, random_delta, sources

TOKENS = [5, 17, 33, 9, 71, 40]
#: Models that cannot be compared, adapter or not: test_architectures.py holds their conversion all the same.
NOT_ALIKE = {
    **dict.fromkeys(
        "afmoe bamba deepseek_v3 glm4_moe_lite".split(),
        "without an adapter this tiny model has other logits in llama.cpp than in transformers",
    ),
    **dict.fromkeys(
        "dots1 exaone_moe solar_open gemma3n_text phi phimoe minicpm3 llama4 llama4_text qwen2_vl qwen2_5_vl qwen3_vl "
        "qwen3_vl_moe".split(),
        "llama.cpp does not load a model of these sizes",
    ),
    **dict.fromkeys(
        "gpt_neox hunyuan_v1_moe".split(), "the converter wants fields that transformers does not save here"
    ),
    "minimax_m2": "llama.cpp ends where it computes this tiny model, adapter or not",
    "glm4v": "transformers does not compute a model of these sizes",
}


@pytest.fixture(scope="session")
def converter() -> Path:
    try:
        return fetched()
    except Exception as error:
        pytest.skip(f"the source package of llama-cpp-python cannot be fetched: {error}")


@pytest.mark.slow
def test_the_fixture_is_what_the_converter_says_today(converter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fixtures.make_architectures", str(tmp_path / "again.json")]
    subprocess.run(command, cwd=FIXTURE.parent.parent.parent, check=True)  # it has a ``gguf`` of its own
    assert (tmp_path / "again.json").read_text() == FIXTURE.read_text()


def numbered_model(model_type: str) -> nn.Module:
    """The tiny model with numbers that a trained one might have."""
    torch.manual_seed(0)
    model, numbers = model_of(model_type), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 2 or (tensor.dim() == 3 and "conv" not in name):
                tensor.copy_(torch.randn(tensor.shape, generator=numbers) * 0.9 / tensor.shape[-1] ** 0.5)
            elif "bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=numbers) * 0.1)
    return model


def logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()


def llama_cpp_logits(base: Path, adapters: list[Path]) -> np.ndarray:
    """In a process of its own: llama.cpp ends the one that it is in where a model is not what it takes for granted."""
    out = base.with_suffix(".npy")
    code = (
        "import sys, numpy as np; from pathlib import Path; from tests.fixtures.make_logits import llama_cpp_logits\n"
        f"found = llama_cpp_logits(Path(sys.argv[1]), [(Path(one), 1.0) for one in sys.argv[3:]], {TOKENS})\n"
        "np.save(sys.argv[2], found)"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, str(base), str(out), *map(str, adapters)]
    done = subprocess.run(words, cwd=FIXTURE.parent.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAID)
def test_llama_cpp_computes_what_the_adapter_says(
    model_type: str, converter: Path, llama_cpp: object, tmp_path: Path
) -> None:
    if model_type in NOT_ALIKE:
        pytest.skip(NOT_ALIKE[model_type])
    model = numbered_model(model_type)
    saved(model, model_type, tmp_path)
    file = write_gguf(tmp_path)
    plain = llama_cpp_logits(file, [])
    before = logits(model)
    np.testing.assert_allclose(plain, before, atol=5e-3 * np.abs(before).max())
    base, arch = open_base(tmp_path), SAID[model_type]["gguf"]
    deltas: dict[str, LoraDelta] = {}
    parameters = dict(model.named_parameters())
    for n, name in enumerate(sources(model_type)):
        delta, change = random_delta(model_type, name, n)
        scale = 0.2 / (1 if delta.kind == "embedding" else delta.in_features) ** 0.5
        one = LoadedLora("one", {name: delta.scaled(scale)}, naming="hf")
        ways = [*base.tied.values(), *base.tied]
        if name in ways or any(left_out(arch, there) for there in convert_names(one, base_of(model_type)).adapters):
            continue
        deltas[name] = delta.scaled(scale)
        with torch.no_grad():
            parameters[name] += torch.tensor(change * scale).float()
    path = convert_names(LoadedLora("mine", deltas, naming="hf"), base).save(tmp_path / "mine.gguf")
    found, wanted = llama_cpp_logits(file, [path]), logits(model)
    assert np.abs(wanted - before).max() > 0.1 * np.abs(before).max(), "the adapter changes too little to tell"
    np.testing.assert_allclose(found, wanted, atol=5e-3 * np.abs(wanted).max())
