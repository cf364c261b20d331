"""The real vLLM serves mixtures by name: the text is that of `handle.rows`, and what cannot be served has a reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorastack import LoadedLora, load
from lorastack.mixture import Mixture
from tests.conftest import ROOT
from tests.fleet.engine import Server, program, serving
from tests.fleet.padded import pad_adapter, pad_base

pytestmark = pytest.mark.slow
PROMPTS = ("Once upon a time there was a little", "There once was a brave", "One day", "The dog and the cat")
MIXTURES = [
    "luna", "robot", "luna:0.5", "robot:0.5", "luna:0.7+robot:0.3", "luna:0.3+robot:0.7", "luna+robot", "luna:-0.5",
    "luna:2", "robot:1.5+luna:-1", "luna:0.25+robot:0.25", "pair", "pair:0.5", "pair+luna:-0.5", "luna:0.9+robot:0.8",
    "part:2+robot:0.5",
]  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """The demo, padded: ``base`` and ``library``."""
    program()
    folder = tmp_path_factory.mktemp("fleet")
    pad_base(demo / "base", folder / "base")
    library = folder / "library"
    library.mkdir()
    for name in ("luna", "robot"):
        pad_adapter(demo / name, library / name)
    # One with a part of the weights: in its mixtures ranks differ from weight to weight.
    load(library / "luna").select("*.q_proj.weight").save(library / "part")
    (library / "pair.toml").write_text('[[adapter]]\nsource = "luna"\nscale = 0.6\n[[adapter]]\nsource = "robot"\n')
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> Any:
    """What `handle.rows` writes: (mixtures, prompt) -> tokens of each."""
    import torch

    from lorastack.torch import attach_all
    from lorastack.torch.generate import encode, load_base

    torch.set_num_threads(1)
    model, tokenizer = load_base(str(place / "base"))
    loras = [load(place / "library" / name) for name in ("luna", "robot", "part")]

    def scales(text: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, scale in Mixture.parse(text):
            for one, own in {"pair": {"luna": 0.6, "robot": 1.0}}.get(name, {name: 1.0}).items():
                found[one] = found.get(one, 0.0) + scale * own
        return found

    def tokens(mixtures: Sequence[str], prompt: str) -> tuple[list[int], list[list[int]]]:
        inputs = encode(tokenizer, [prompt] * len(mixtures))
        length = inputs["input_ids"].shape[1]
        with (
            torch.no_grad(),
            attach_all(model, [(one, 0.0) for one in loras]) as handle,
            handle.rows([scales(one) for one in mixtures]),
        ):
            out = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                max_new_tokens=COUNT, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        rows = [row[length:].tolist() for row in out]
        end = model.generation_config.eos_token_id
        return inputs["input_ids"][0].tolist(), [row[: row.index(end) + 1] if end in row else row for row in rows]

    return tokens


@pytest.fixture(scope="module")
def wide(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a slot for each mixture."""
    with serving(place / "base", place / "library", tmp_path_factory.mktemp("wide"), "--max-loras", "16",
                 "--max-cpu-loras", "64", "--enable-prompt-tokens-details") as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def narrow(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two slots, the endpoint, and little room in its cache."""
    spoil(place)
    plugins = "lorastack,lorastack_endpoint"
    with serving(place / "base", place / "library", tmp_path_factory.mktemp("narrow"), "--max-loras", "2",
                 "--max-cpu-loras", "2", VLLM_PLUGINS=plugins, max_mixtures="20") as server:  # fmt: skip
        yield server


def spoil(place: Path) -> None:
    """Put adapters into the library that cannot be served."""
    library, weights = place / "library", "adapter_model.safetensors"

    def spoilt(name: str, change: Any = lambda tensors: tensors, **fields: Any) -> None:
        folder = library / name
        folder.mkdir()
        config = json.loads((library / "luna" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        save_file(change(load_file(library / "luna" / weights)), folder / weights, metadata={"format": "pt"})

    def nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = next(iter(tensors))
        return tensors | {first: np.full_like(tensors[first], np.nan)}

    def dora(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        more = {
            name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(array.shape[0], array.dtype)
            for name, array in tensors.items()
            if name.endswith("lora_B.weight")
        }
        return tensors | more

    spoilt("nan", nan)
    spoilt("dora", dora, use_dora=True)
    spoilt("deeper", lambda tensors: {name.replace("layers.3.", "layers.9."): a for name, a in tensors.items()})
    rng = np.random.default_rng(0)
    other = {"model.layers.0.self_attn.q_proj.weight": (rng.normal(size=(4, 48)), rng.normal(size=(48, 4)))}
    LoadedLora.from_tensors(other, name="other", naming="hf").save(library / "other")
    high = {"model.layers.0.mlp.up_proj.weight": (rng.normal(size=(40, 64)), rng.normal(size=(176, 40)))}
    LoadedLora.from_tensors(high, name="high", naming="hf").save(library / "high")
    (library / "damaged").mkdir()
    (library / "damaged" / "adapter_config.json").write_text("{")


def test_sixteen_mixtures_at_once_write_what_rows_write(wide: Server, expected: Any) -> None:
    for prompt in PROMPTS[:2]:
        ids, rows = expected(MIXTURES, prompt)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda mixture, ids=ids: wide.tokens(mixture, ids, COUNT), MIXTURES))
        assert found == rows
    assert len({tuple(row) for row in rows}) >= 8


def test_every_spelling_is_answered_under_its_own_name(wide: Server, expected: Any) -> None:
    ids, rows = expected(["luna:0.7+robot:0.3"], PROMPTS[0])
    spellings = ["luna:0.7+robot:0.3", "robot:.3+luna:0.70", "luna:0.35+robot:0.30+luna:0.35"]
    for spelling in spellings:
        status, answer = wide.complete(spelling, ids, COUNT)
        assert (status, answer["model"], answer["choices"][0]["token_ids"]) == (200, spelling, rows[0])
    served = {one["id"]: one["root"] for one in wide.get("/v1/models")[1]["data"]}
    assert len({served[one] for one in spellings}) == 1  # one file


def test_two_mixtures_of_a_prompt_share_no_cached_prefix(wide: Server, expected: Any) -> None:
    """A prefix is cached in blocks of 128 tokens here; of one mixture it is found again, of the other it is not."""
    prompt = " ".join([PROMPTS[0]] * 18)

    def cached(model: str, ids: list[int]) -> int:
        details = wide.complete(model, ids, 1)[1]["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] if details else 0

    mixtures = ["luna:1.25", "robot:1.25"]
    ids, rows = expected(mixtures, prompt)
    assert 128 < len(ids) < 230
    assert [cached(one, ids) for one in mixtures] == [0, 0]
    assert [cached(one, ids) for one in mixtures] == [128, 128]
    assert [wide.tokens(one, ids, COUNT) for one in mixtures] == rows
    assert rows[0] != rows[1]


def test_two_slots_serve_any_number_in_turn(narrow: Server, expected: Any) -> None:
    ids, rows = expected(MIXTURES, PROMPTS[3])
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda mixture: narrow.tokens(mixture, ids, COUNT), MIXTURES)) == rows
    assert narrow.alive


@pytest.mark.parametrize(("name", "status", "reason"), [
    ("nobody", 404, "there are 10: damaged, deeper, dora, high, luna, nan, other, pair, part, robot"),
    ("luna+rabot", 404, "did you mean robot?"),
    ("../library/luna", 404, "is no mixture"),
    ("/etc/passwd", 404, "is no mixture"),
    ("..", 404, "is no mixture"),
    ("luna:nan", 404, "is no mixture"),
    ("luna:1e1", 404, "is no mixture"),
    ("luna:0", 400, "ask for the base by its own name"),
    ("+".join(f"luna:{n}" for n in range(1, 10)), 400, "a mixture has at most 8"),
    ("nan", 400, "are NaN or Inf"),
    ("nan:0.1+luna", 400, "are NaN or Inf"),
    ("dora", 400, "DoRA magnitude"),
    ("deeper", 400, "layers.9."),
    ("other:0.5", 400, "does not fit base"),
    ("high", 400, "has rank 40, vLLM was started for 32"),
    ("damaged", 400, "adapter damaged: "),
])  # fmt: skip
def test_what_cannot_be_served_has_its_status_and_a_reason(narrow: Server, name: str, status: int, reason: str) -> None:
    found, answer = narrow.complete(name, "Once")
    assert (found, reason in answer["error"]["message"]) == (status, True), answer
    assert narrow.alive


def test_the_endpoint_lists_what_there_is_and_what_is_served(narrow: Server) -> None:
    assert narrow.complete("luna", "Once", 1)[0] == 200
    status, said = narrow.get("/v1/mixtures")
    assert status == 200
    assert said["max_loras"] == said["max_cpu_loras"] == 2
    assert said["max_lora_rank"] == 32
    assert "pair" in said["adapters"]
    assert Path(said["served"]["luna"]).is_dir()


def test_a_cap_on_distinct_mixtures(narrow: Server) -> None:
    """Last: it uses up what this server may serve."""
    statuses = [narrow.complete(f"luna:{n}", "Once", 1) for n in range(1, 25)]
    assert statuses[-1][0] == 503
    assert "no more than 20" in statuses[-1][1]["error"]["message"]
    assert narrow.complete("luna", "Once", 1)[0] == 200
    assert narrow.alive


def test_vllm_does_not_start_with_several_api_servers(place: Path, tmp_path: Path) -> None:
    """Each would number adapters from 1 on, and the engine would take one for the other: `vllm-check` says one."""
    words = ("--max-loras", "2", "--api-server-count", "2")
    with (
        pytest.raises(AssertionError, match=r"RUNTIME_LORA_UPDATING cannot be used with api_server_count > 1"),
        serving(place / "base", place / "library", tmp_path, *words),
    ):
        pass


def test_an_unknown_name_is_left_to_a_resolver_behind_ours(place: Path, tmp_path: Path) -> None:
    """In vLLM's environment, with its own registry."""
    code = """
import asyncio, os
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from lorastack.fleet.vllm_plugin import register
register()
register()
ours = LoRAResolverRegistry.get_resolver("lorastack")
def status():
    try:
        return asyncio.run(ours.resolve_lora(os.environ["BASE"], "nobody"))
    except Exception as error:
        return error.status_code
class Other(LoRAResolver):
    async def resolve_lora(self, base_model_name, lora_name):
        return None
alone = status()
LoRAResolverRegistry.register_resolver("other", Other())
found = asyncio.run(ours.resolve_lora(os.environ["BASE"], "luna:.5"))
print("said", alone, status(), found.lora_name, os.path.isdir(found.lora_path))
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "src"), LORASTACK_LIBRARY=str(place / "library"),
                       LORASTACK_CACHE=str(tmp_path / "cache"), BASE=str(place / "base"))  # fmt: skip
    done = subprocess.run([str(program("python")), "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "said 404 None luna:.5 True", done.stderr[-2000:]
