"""Every row of a batch with its own mixture: each row equals the same row alone with its own stack."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from lorastack import LoadedLora, LoraStack
from lorastack.errors import ArgumentError, ShapeError, UnknownNameError, UnsupportedError
from lorastack.torch import Handle, attach
from tests.torch.tiny import GROUPED, MLP, far, make_model, save_adapter, tokens

MIXTURES: list[dict[str, float]] = [
    {"a0": 1.0},
    {"a1": 0.5, "a2": 0.5},
    {},
    {"a0": -0.7, "a2": 1.3},
    {"a2": 1.0},
    {"a0": 0.2, "a1": 0.2, "a2": 0.2},
]


def loras(model: torch.nn.Module, folder: Path, targets: list[str] = MLP) -> list[LoadedLora]:
    """Three adapters of different ranks, one of them on other modules than the rest."""
    said = [{"r": 2}, {"r": 5, "use_rslora": True}, {"r": 3, "target_modules": targets[:2]}]
    return [
        LoadedLora.load(save_adapter(model, folder / f"a{n}", seed=n, **({"target_modules": targets} | config)))
        for n, config in enumerate(said)
    ]


def alone(
    model: torch.nn.Module, loras_: list[LoadedLora], mixture: dict[str, float], **inputs: torch.Tensor
) -> torch.Tensor:
    """The logits of one row with a stack of its own."""
    stack = LoraStack([(lora, mixture[lora.name]) for lora in loras_ if lora.name in mixture])
    with torch.no_grad():
        if not stack:
            return model(**inputs).logits
        with attach(model, stack):
            return model(**inputs).logits


@pytest.fixture
def setup(tmp_path: Path):
    model = make_model("llama")
    return model, loras(model, tmp_path)


def test_every_row_equals_itself_alone(setup) -> None:
    model, three = setup
    ids = tokens(len(MIXTURES), 6)
    expected = [alone(model, three, mixture, input_ids=ids[n : n + 1]) for n, mixture in enumerate(MIXTURES)]
    with attach(model, LoraStack([(lora, 0.9) for lora in three])) as handle, torch.no_grad():
        stacked = model(input_ids=ids).logits
        with handle.rows(MIXTURES):
            found = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, stacked)
    for n, row in enumerate(expected):
        assert far(found[n : n + 1], row) < 1e-5
    assert far(found, stacked) > 1e-3


@pytest.mark.parametrize("rows", [1, 2, 24])
def test_many_rows_with_one_adapter_each(setup, rows: int) -> None:
    model, three = setup
    ids = tokens(rows, 3)
    mixtures = [{f"a{n % 3}": 1.0} for n in range(rows)]
    expected = [alone(model, three, mixture, input_ids=ids[n : n + 1]) for n, mixture in enumerate(mixtures)]
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle, torch.no_grad(), handle.rows(mixtures):
        found = model(input_ids=ids).logits
    assert far(found, torch.cat(expected)) < 1e-5


def test_ways_agree(setup, monkeypatch) -> None:
    model, three = setup
    ids = tokens(len(MIXTURES), 6)
    found = []
    for ranks in (0, 10**9):  # each row its own, dense
        monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
        with attach(model, LoraStack([(x, 1.0) for x in three])) as handle, torch.no_grad(), handle.rows(MIXTURES):
            found.append(model(input_ids=ids).logits)
    assert far(found[0], found[1]) < 1e-5


def test_a_nan_adapter_in_one_row_leaves_the_others_clean(setup, monkeypatch) -> None:
    model, three = setup
    name = "model.layers.0.mlp.down_proj.weight"
    bad = {name: (np.full((2, 48), np.nan, np.float32), np.full((32, 2), np.inf, np.float32))}
    broken = LoadedLora.from_tensors(bad, name="nan", allow_nonfinite=True)
    ids = tokens(4, 5)
    mixtures: list[dict[str, float]] = [{"a0": 1.0}, {"nan": 1.0}, {}, {"a1": 1.0}]
    for ranks in (0, 10**9):
        monkeypatch.setattr("lorastack.torch.ways.choice.DENSE_RANKS", ranks)
        stack = LoraStack([(three[0], 1.0), (broken, 1.0), (three[1], 1.0)])
        with attach(model, stack) as handle, torch.no_grad(), handle.rows(mixtures):
            found = model(input_ids=ids).logits
        assert found[1].isnan().any()
        for n in (0, 2, 3):
            assert far(found[n : n + 1], alone(model, three, mixtures[n], input_ids=ids[n : n + 1])) < 1e-5


def generate(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, **options: object) -> torch.Tensor:
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, **options
    )


class Jitter(tf.LogitsProcessor):
    """Moves every score by more than two ways to compute it differ."""

    def __init__(self, size: float) -> None:
        self.size, self.random = size, torch.Generator().manual_seed(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.size * torch.randn(scores.shape, generator=self.random).sign()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate_gives_each_row_its_own_text(setup, options: dict[str, int]) -> None:
    model, three = setup
    lengths = [6, 3, 5, 4, 6, 2]
    ids, mask = tokens(6, 6), torch.ones(6, 6, dtype=torch.long)
    for n, length in enumerate(lengths):  # left padding
        ids[n, : 6 - length], mask[n, : 6 - length] = 0, 0
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle, handle.rows(MIXTURES):
        together = generate(model, ids, mask, **options)
    each = options.get("num_return_sequences", 1)
    for n, mixture in enumerate(MIXTURES):
        row = slice(n, n + 1)
        stack = LoraStack([(lora, mixture[lora.name]) for lora in three if lora.name in mixture])
        with attach(model, stack) if stack else contextlib.nullcontext():
            single = generate(model, ids[row], mask[row], **options)
            shaken = generate(model, ids[row], mask[row], logits_processor=[Jitter(1e-4)], **options)
        assert torch.equal(shaken, single), "a near tie: rounding may decide what is written here; take other tokens"
        found = together[n * each : (n + 1) * each, : single.shape[1]]
        assert torch.equal(found, single), (n, mixture)


def test_packed_rows_by_cu_seqlens_and_by_index(setup) -> None:
    model, three = setup
    lengths = [3, 1, 4, 2, 5, 2]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    same = index[:, None] == index[None]
    causal = torch.ones(len(index), len(index)).tril().bool() & same
    mask = torch.where(causal, 0.0, torch.finfo(torch.float32).min)[None, None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle, torch.no_grad():
        for packed in ({"cu_seqlens": bounds}, {"index": index}):
            with handle.rows(MIXTURES, **packed):
                found = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
            expected = []
            for n, part in enumerate(ids.split(lengths, 1)):
                with handle.rows([MIXTURES[n]]):
                    expected.append(model(input_ids=part).logits)
            assert far(found, torch.cat(expected, 1)) < 1e-5


def test_other_architectures_mix_by_row_too(tmp_path: Path) -> None:
    for name in ("gpt2", "t5", "gemma"):
        model = make_model(name)
        from tests.torch.tiny import ARCHITECTURES

        three = loras(model, tmp_path / name, [*ARCHITECTURES[name][1], ARCHITECTURES[name][3]])
        inputs = {key: value.repeat(3, 1) for key, value in ARCHITECTURES[name][2]().items()}
        with (
            attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle,
            torch.no_grad(),
            handle.rows(MIXTURES),
        ):
            found = model(**inputs).logits
        for n, mixture in enumerate(MIXTURES):
            row = {key: value[n : n + 1] for key, value in inputs.items()}
            assert far(found[n : n + 1], alone(model, three, mixture, **row)) < 1e-5, (name, n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_as_near_as_the_type_allows(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    three = loras(model, tmp_path)
    ids = tokens(6, 5)
    exact = [alone(model, three, mixture, input_ids=ids[n : n + 1]) for n, mixture in enumerate(MIXTURES)]
    half = copy.deepcopy(model).to(dtype)
    with attach(half, LoraStack([(lora, 1.0) for lora in three])) as handle, torch.no_grad(), handle.rows(MIXTURES):
        found = half(input_ids=ids).logits
    assert found.dtype == dtype
    assert far(found.float(), torch.cat(exact)) < (0.08 if dtype == torch.bfloat16 else 0.01)


def test_unknown_names_and_wrong_batches_are_errors(setup) -> None:
    model, three = setup
    with attach(model, LoraStack([(lora, 1.0) for lora in three])) as handle, torch.no_grad():
        with pytest.raises(UnknownNameError, match="no adapter is named x, zara; attached are a0, a1, a2"):
            enter(handle, [{"zara": 1.0}, {"x": 1.0}])
        with pytest.raises(ArgumentError, match="a scale is a finite number, got nan"):
            enter(handle, [{"a0": float("nan")}])
        with pytest.raises(ArgumentError, match="needs a mixture for each row"):
            enter(handle, [])
        with pytest.raises(ArgumentError, match="expected 0 and 2 ascending ends"):
            enter(handle, [{}, {}], cu_seqlens=[0, 3])
        with (
            pytest.raises(ShapeError, match="the batch has 2 rows, there are 3 mixtures; give one for each row"),
            handle.rows([{"a0": 1.0}] * 3),
        ):
            model(input_ids=tokens(2, 5))
        model(input_ids=tokens(2, 5))  # after the errors the stack is as before


def enter(handle: Handle, mixtures: list[dict[str, float]], **options: object) -> None:
    with handle.rows(mixtures, **options):
        pass


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"bias": "all"}, "it has trained biases of the base"),
        ({"modules_to_save": ["lm_head"]}, "it has whole saved modules"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "it has trained tokens"),
    ],
)
def test_what_has_no_row_is_an_error_that_says_so(tmp_path: Path, config: dict, why: str) -> None:
    model = make_model("qwen2" if "bias" in config else "llama")
    folder = save_adapter(model, tmp_path / "odd", target_modules=["q_proj"], **config)
    plain = save_adapter(model, tmp_path / "plain", target_modules=["q_proj"])
    with attach(model, LoraStack([(LoadedLora.load(folder), 1.0), (LoadedLora.load(plain), 1.0)])) as handle:
        with pytest.raises(UnsupportedError, match=f"odd: {why}; remove it from the handle first"):
            enter(handle, [{"plain": 1.0}, {}])
        handle.remove("odd")
        enter(handle, [{"plain": 1.0}, {}])


@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet"])
@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_and_biases_of_lora_b_by_row(name: str, config: dict, tmp_path: Path) -> None:
    from tests.torch.tiny import ARCHITECTURES

    model = make_model(name)
    targets = ARCHITECTURES[name][1]
    said = [{**config, "r": 2}, {"r": 5}, {**config, "r": 3, "target_modules": targets[:2]}]
    three = [
        LoadedLora.load(save_adapter(model, tmp_path / f"a{n}", seed=n, **({"target_modules": targets} | one)))
        for n, one in enumerate(said)
    ]
    inputs = {key: value.repeat(3, *[1] * (value.dim() - 1)) for key, value in ARCHITECTURES[name][2]().items()}

    def out(**given: torch.Tensor) -> torch.Tensor:
        result = model(**given)
        return getattr(result, "logits", result)

    for packed in (False, True) if name == "llama" else (False,):
        with attach(model, LoraStack([(lora, 0.9) for lora in three])) as handle, torch.no_grad():
            if packed:
                index = torch.arange(6)
                ids = inputs["input_ids"][:, :1].reshape(1, 6)
                mask = torch.where(torch.eye(6) > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
                with handle.rows(MIXTURES, index=index):
                    found = out(input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids))[0][:, None]
            else:
                with handle.rows(MIXTURES):
                    found = out(**inputs)
        for n, mixture in enumerate(MIXTURES):
            stack = LoraStack([(lora, mixture[lora.name]) for lora in three if lora.name in mixture])
            row = {key: (value[n : n + 1, :1] if packed else value[n : n + 1]) for key, value in inputs.items()}
            with attach(model, stack) if stack else contextlib.nullcontext(), torch.no_grad():
                assert far(found[n : n + 1], out(**row)) < 1e-5, (n, mixture)
