"""Baking a stack into one adapter: against float64, the real llama.cpp and the real PEFT."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from lorastack import LoadedLora, LoraDelta, LoraStack, TargetModule, convert_names, load, save
from lorastack.base import BaseModel
from lorastack.core.factor import Factor
from lorastack.errors import ArgumentError, NamingError, ShapeError, UnsupportedError
from tests.fixtures.make_logits import llama_cpp_logits, peft_model
from tests.models import load_model, logits, numpy_stack

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT looks patterns up by parameter, and then says that they match no module.
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match any targeted module:RuntimeWarning"),
]
STORED = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
#: On logits of magnitude 20: float32's sums differ by 2e-5; the factors' own rounding by their type's, of which
#: bfloat16 has 8 times float16's; llama.cpp rounds the activations too where weights are q8_0.
TOLERANCE = {"f32": 1e-4, "f16": 2e-2, "bf16": 8 * 2e-2, "q8_0": 0.2}
SHAPES = {"linear": ((), (7,), (5,)), "embedding": ((), (7,), (5,)), "experts": ((3,), (7,), (5,)),
          "conv": ((), (4, 3, 2), (5,))}  # fmt: skip


def delta_of(rng: np.random.Generator, kind: str, rank: int, dtype: np.dtype, scaling: float) -> LoraDelta:
    lead, n_in, n_out = SHAPES[kind]
    a, b = (*lead, rank, *n_in), (*lead, *n_out, rank) + ((1, 1) if kind == "conv" else ())
    return LoraDelta(rng.standard_normal(a).astype(dtype), rng.standard_normal(b).astype(dtype), scaling, kind)  # type: ignore[arg-type]


def dense(delta: LoraDelta, size: bool = False) -> np.ndarray:
    """B @ A times scaling in float64, experts and kernels included; ``size``: with all signs taken away."""
    a, b = (np.abs(x.astype(np.float64)) if size else x.astype(np.float64) for x in (delta.a, delta.b))
    if delta.kind == "conv":
        product = np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), a)
    else:
        product = b @ a
    return product * (abs(delta.scaling) if size else delta.scaling)


def assert_is_the_sum(baked: LoadedLora, terms: dict[str, list[tuple[float, LoraDelta]]]) -> None:
    assert sorted(baked.adapters) == sorted(terms)
    for name, parts in terms.items():
        expected = sum(scale * dense(delta) for scale, delta in parts)
        size = sum(abs(scale) * dense(delta, size=True) for scale, delta in parts)
        # Every product of a scale and a B is rounded to float32, and the scale before it.
        off = np.abs(dense(baked.adapters[name]) - expected)
        assert (off <= 3 * 2.0**-24 * size + 1e-30).all(), f"{name}: off by {off.max()}"


# ---- algebra

WEIGHTS = {"layer.0.weight": "linear", "layer.1.weight": "linear", "embed.weight": "embedding",
           "mlp.experts.up": "experts", "conv.weight": "conv"}  # fmt: skip
scales = st.sampled_from([0.0, 1.0, -1.0, 0.7]) | st.floats(-3, 3)


@st.composite
def stacks(draw: st.DrawFn) -> LoraStack:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stack = LoraStack()
    for n in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, unique=True))
        lora = LoadedLora.from_tensors(
            {
                name: delta_of(
                    rng, WEIGHTS[name], draw(st.integers(1, 5)), draw(st.sampled_from(STORED)), draw(st.floats(0.1, 9))
                )
                for name in names
            },
            name=f"lora{n}",
            naming="hf",
        )
        for scale in draw(st.lists(scales, min_size=1, max_size=2)):  # twice: the same adapter, and it counts twice
            stack.push(lora, scale)
    return stack


@settings(max_examples=120, deadline=None)
@given(stack=stacks())
def test_the_baked_adapter_is_the_sum(stack: LoraStack) -> None:
    baked = stack.bake()
    assert_is_the_sum(baked, {name: list(stack.terms(name)) for name in stack.weights})
    for name in stack.weights:
        kept = [delta.rank for scale, delta in stack.terms(name) if scale * delta.scaling != 0]
        assert baked.adapters[name].rank == max(sum(kept), 1), "ranks are put side by side"
    assert len({delta.scaling for delta in baked.adapters.values()}) == 1, "programs that know one scaling"


@settings(max_examples=40, deadline=None)
@given(stack=stacks(), outer=scales)
def test_a_baked_adapter_bakes_again(stack: LoraStack, outer: float) -> None:
    baked = stack.bake()
    again = LoraStack([(baked, outer), (baked, -0.5)]).bake()
    assert_is_the_sum(again, {name: [(outer, delta), (-0.5, delta)] for name, delta in baked.adapters.items()})


def test_one_adapter_at_one_is_taken_over_as_it_is() -> None:
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors(
        {name: delta_of(rng, kind, 3, STORED[1], 2.5) for name, kind in WEIGHTS.items()}, naming="hf"
    )
    for name, delta in LoraStack([(lora, 1.0)]).bake().adapters.items():
        assert delta.scaling == 2.5
        assert delta.a.dtype == delta.b.dtype == np.float16
        np.testing.assert_array_equal(delta.a, lora.adapters[name].a)
        np.testing.assert_array_equal(delta.b, lora.adapters[name].b)


def test_equal_scalings_are_not_folded_so_that_16_bit_factors_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    one, two = (LoadedLora.from_tensors({"l.0.weight": delta_of(rng, "linear", 3, STORED[2], 2.0)}) for _ in range(2))
    (delta,) = LoraStack([(one, 0.5), (two, 0.5)]).bake().adapters.values()
    assert (delta.scaling, delta.b.dtype) == (1.0, STORED[2])
    np.testing.assert_array_equal(
        delta.b, np.concatenate([one.adapters["l.0.weight"].b, two.adapters["l.0.weight"].b], 1)
    )


class Mine:
    """An adapter of the user's own, known by (target module, layer)."""

    rank, alpha, target_modules, layers = 2, 5.0, (TargetModule.QUERY_PROJ, TargetModule.UP_PROJ), (0, 1)

    def __init__(self, seed: int, rows: int = 8) -> None:
        rng = np.random.default_rng(seed)
        self.held = {
            (t, n): LoraDelta(rng.standard_normal((2, 7)), rng.standard_normal((rows, 2)), 0.5)
            for t in self.target_modules for n in self.layers if (str(t), n) != ("up_proj", 1)
        }  # fmt: skip

    def delta(self, target: TargetModule, layer: int) -> LoraDelta | None:
        return self.held.get((target, layer))


Q0, Q1, UP0 = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight",
               "model.layers.0.mlp.up_proj.weight")  # fmt: skip
HF = BaseModel("m", "hf", "LlamaForCausalLM", {"num_hidden_layers": 2, "num_attention_heads": 2},
               {Q0: (8, 7), Q1: (8, 7), UP0: (8, 7), "model.layers.1.mlp.up_proj.weight": (8, 7)})  # fmt: skip
GGUF = BaseModel("m.gguf", "gguf", "llama", {"llama.block_count": 2, "llama.attention.head_count": 2},
                 {f"blk.{n}.{stem}.weight": (8, 7) for n in (0, 1) for stem in ("attn_q", "ffn_up")})  # fmt: skip


def test_adapters_of_the_second_list_count_with_the_base_naming_their_weights() -> None:
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors({Q0: (rng.standard_normal((3, 7)), rng.standard_normal((8, 3)))}, alpha=4)
    stack, mine = LoraStack([(lora, -0.5)]), Mine(1)
    stack.push_adapter(mine)
    stack.push_adapter(Mine(2))
    one, two = mine.held, Mine(2).held
    terms = {
        name: ([(-0.5, lora.adapters[Q0])] if name == Q0 else []) + [(2.5, one[place]), (2.5, two[place])]
        for name, place in {Q0: (TargetModule.QUERY_PROJ, 0), Q1: (TargetModule.QUERY_PROJ, 1), UP0: (
            TargetModule.UP_PROJ, 0)}.items()
    }  # fmt: skip
    assert_is_the_sum(stack.bake(base=HF), terms)


def test_with_a_gguf_base_their_rows_take_its_order() -> None:
    stack = LoraStack()
    stack.push_adapter(mine := Mine(3))
    baked = stack.bake(base=GGUF)
    assert (baked.naming, baked.metadata["general.architecture"]) == ("gguf", "llama")
    # Two heads of four rows: HF [head, half, pair] -> GGUF [head, pair, half]
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    for layer in (0, 1):
        true = dense(mine.held[TargetModule.QUERY_PROJ, layer]) * 2.5
        np.testing.assert_allclose(dense(baked.adapters[f"blk.{layer}.attn_q.weight"]), true[order], rtol=1e-6)
    up = dense(mine.held[TargetModule.UP_PROJ, 0]) * 2.5
    np.testing.assert_allclose(dense(baked.adapters["blk.0.ffn_up.weight"]), up, rtol=1e-6)
    assert len(baked.adapters) == 3


def test_beside_gguf_adapters_and_with_a_hugging_face_base_too() -> None:
    rng = np.random.default_rng(0)
    lora = LoadedLora.from_tensors({"blk.0.attn_q.weight": (rng.standard_normal((3, 7)), rng.standard_normal((8, 3)))})
    stack = LoraStack([(lora, 2.0)])
    stack.push_adapter(mine := Mine(3))
    baked = stack.bake(base=HF)
    true = 2 * dense(lora.adapters["blk.0.attn_q.weight"])
    true += 2.5 * dense(mine.held[TargetModule.QUERY_PROJ, 0])[[0, 2, 1, 3, 4, 6, 5, 7]]
    np.testing.assert_allclose(dense(baked.adapters["blk.0.attn_q.weight"]), true, rtol=1e-5, atol=1e-5)
    assert baked.metadata["general.architecture"] == "llama"


def test_a_loaded_adapter_on_the_second_list_counts_with_its_own_scalings() -> None:
    rng = np.random.default_rng(0)
    deltas = {Q0: LoraDelta(rng.standard_normal((3, 7)), rng.standard_normal((8, 3)), 4 / 3**0.5),
              Q1: LoraDelta(rng.standard_normal((1, 7)), rng.standard_normal((8, 1)), -0.3)}  # fmt: skip
    stack = LoraStack()
    stack.push_adapter(LoadedLora.from_tensors(deltas))
    assert_is_the_sum(stack.bake(base=HF), {name: [(1.0, delta)] for name, delta in deltas.items()})


# ---- the real programs

PROMPTS = [[0, 300, 41, 87, 120, 7, 260, 401, 33], [0, 5, 499, 250, 77]]


@pytest.fixture(scope="module")
def patterned(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a rank and an alpha of its own here and there, written by PEFT."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
        rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 7, "layers.3.mlp.down_proj": 1},
        alpha_pattern={"o_proj": 3, "layers.1.self_attn.q_proj": 11, "layers.2.self_attn.q_proj": 1},
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.15)
    folder = tmp_path_factory.mktemp("made") / "patterned"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weaker(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """luna with an alpha of its own."""
    folder = tmp_path_factory.mktemp("made") / "weaker"
    folder.mkdir()
    said = json.loads((demo / "luna/adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"lora_alpha": 3}))
    (folder / "adapter_model.safetensors").write_bytes((demo / "luna/adapter_model.safetensors").read_bytes())
    return folder


#: What is baked: adapters of both formats with their scales.
STACKS = {
    "plain": [("excited.gguf", 1.0)],
    "rslora": [("robot", 1.0)],
    "patterns": [("patterned", 1.0)],
    "negative": [("luna", 1.0), ("excited.gguf", -0.7)],
    "different alphas": [("luna", 0.5), ("weaker", 0.8)],
    "two formats": [("excited.gguf", 0.7), ("luna", 0.4)],
    "twice and zero": [("excited.gguf", 0.5), ("excited.gguf", 0.3), ("robot", 0.0)],
    "all": [("excited.gguf", 0.6), ("luna", 0.5), ("robot", -0.4), ("patterned", 0.3), ("weaker", 0.2)],
}


class Truth:
    """The stack in NumPy on the demo's float32 model, each adapter under the names it was loaded with."""

    def __init__(self, demo: Path, made: dict[str, Path]) -> None:
        self.demo, self.made, self.model = demo, made, load_model(demo / "base")
        self.known: dict[str, np.ndarray] = {}

    def path(self, name: str) -> Path:
        return self.made.get(name, self.demo / name)

    def logits(self, stack: Sequence[tuple[str, float]], tokens: list[int]) -> np.ndarray:
        key = repr((stack, tokens))
        if key not in self.known:
            with contextlib.ExitStack() as open_:
                for name, scale in stack:
                    open_.enter_context(numpy_stack(self.model, LoraStack([(load(self.path(name)), scale)])))
                self.known[key] = logits(self.model, tokens)
        return self.known[key]

    def stack(self, stack: Sequence[tuple[str, float]], naming: str, base: Path) -> LoraStack:
        """The stack under one kind of names."""
        loaded = [(load(self.path(name)), scale) for name, scale in stack]
        return LoraStack([(convert_names(lora, str(base), naming), scale) for lora, scale in loaded])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def truth(demo: Path, patterned: Path, weaker: Path) -> Truth:
    return Truth(demo, {"patterned": patterned, "weaker": weaker})


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("case", STACKS)
def test_llama_cpp_gives_the_stacks_logits_with_the_baked_file(
    truth: Truth, llama_cpp: object, tmp_path: Path, case: str, dtype: str
) -> None:
    base = truth.demo / ("base" if case in ("two formats", "all") else "base.gguf")
    baked = truth.stack(STACKS[case], "gguf", base).bake(base=base)
    path = save(baked, tmp_path / "baked.gguf", dtype=dtype)
    for tokens in PROMPTS:
        expected = truth.logits(STACKS[case], tokens)
        found = llama_cpp_logits(truth.demo / "base.gguf", [(path, 1.0)], tokens)
        off, moved = np.abs(found - expected).max(), np.abs(expected - truth.logits([], tokens)).max()
        assert off <= TOLERANCE[dtype], f"off by {off}, where the adapters move logits by {moved}"
        if dtype == "f32":
            assert moved > 100 * TOLERANCE["f32"], "the adapters change too little for this to show anything"


def test_llama_cpp_gives_the_same_with_the_baked_file_as_with_its_parts(
    truth: Truth, llama_cpp: object, tmp_path: Path
) -> None:
    base = truth.demo / "base.gguf"
    names = [("luna", 0.6), ("robot", -0.4)]
    stack = truth.stack(names, "gguf", base)
    parts = [(save(lora, tmp_path / f"{lora.name}.gguf"), scale) for lora, scale in stack.entries]
    path = save(stack.bake(), tmp_path / "baked.gguf")
    for tokens in PROMPTS:
        found, expected = (llama_cpp_logits(base, adapters, tokens) for adapters in ([(path, 1.0)], parts))
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("case", "dtype"), [*((case, None) for case in STACKS), ("all", "f16"), ("all", "bf16")])
def test_peft_gives_the_stacks_logits_with_the_baked_folder(
    truth: Truth, tmp_path: Path, case: str, dtype: str | None
) -> None:
    base = truth.demo / "base"
    baked = truth.stack(STACKS[case], "hf", base).bake(base=base)
    folder = save(baked, tmp_path / "baked", dtype=dtype)
    model = peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), [folder])
    layers = {
        path.removeprefix("base_model.model.") + ".weight"
        for path, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert layers == set(baked.adapters)
    for tokens in PROMPTS:
        off = np.abs(logits(model, tokens) - truth.logits(STACKS[case], tokens)).max()
        assert off <= TOLERANCE[dtype or "f32"], f"off by {off}"


def test_programs_that_know_one_alpha_and_one_rank_get_the_right_scaling(truth: Truth, tmp_path: Path) -> None:
    base = truth.demo / "base"
    stack = truth.stack(STACKS["all"], "hf", base)
    first, scale = stack.remove(stack.names[0])
    stack.push(first.select("*.self_attn.*"), scale)  # so that ranks differ from weight to weight
    baked = stack.bake(base=base)
    said = json.loads((save(baked, tmp_path / "baked") / "adapter_config.json").read_text())
    assert len({delta.rank for delta in baked.adapters.values()}) > 1
    (scaling,) = {delta.scaling for delta in baked.adapters.values()}
    assert said["lora_alpha"] / said["r"] == pytest.approx(scaling, rel=1e-15, abs=0)
    assert not said["use_rslora"]
    assert "base_model_name_or_path" not in said, "the adapters do not agree, and the base that was given is a path"
    assert said["task_type"] == "CAUSAL_LM"


# ---- experts, embeddings and convolutions in the real programs


def test_llama_cpp_takes_baked_experts_and_embeddings(shared: Path, llama_cpp: object, tmp_path: Path) -> None:
    cases = shared / "gguf_cases"
    for base, lora in (("base_moe.gguf", "lora_moe.gguf"), ("base.gguf", "lora_embd.gguf")):
        part = load(cases / lora)
        path = save(LoraStack([(part, 1.1), (part, -0.4)]).bake(base=cases / base), tmp_path / lora)
        tokens = [1, 5, 9, 33, 70]
        found = llama_cpp_logits(cases / base, [(path, 1.0)], tokens)
        expected = llama_cpp_logits(cases / base, [(cases / lora, 0.7)], tokens)
        plain = llama_cpp_logits(cases / base, [], tokens)
        assert np.abs(expected - plain).max() > 0.05
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=lora)


class Net(torch.nn.Module):
    """An embedding, convolutions and layers whose names are suffixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.lin = torch.nn.Linear(6, 6)
        self.sub = torch.nn.ModuleDict({"lin": torch.nn.Linear(6, 6), "er_lin": torch.nn.Linear(6, 6)})
        self.conv2 = torch.nn.Conv2d(1, 4, (3, 2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(input_ids).transpose(1, 2)).transpose(1, 2)
        x = self.sub["er_lin"](self.sub["lin"](torch.relu(self.lin(x))))
        return self.conv2(x[:, None])


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        vocab_size=12, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).float().eval()


NET = {"target_modules": ["emb", "conv", "lin", "conv2", "er_lin"]}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
RANKS = {"experts.down_proj": 1, "layers.1.self_attn.q_proj": 4}
ONE = {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
PAIRS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "net": (Net, [{"r": 2, "lora_alpha": 6} | NET,
                  {"r": 3, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"sub.lin": 1, "conv": 4},
                   "alpha_pattern": {"^lin": 8, "conv2": 1}} | NET]),
    "experts": (mixtral, [{"r": 2, "lora_alpha": 4} | EXPERTS,
                          {"r": 3, "lora_alpha": 5, "rank_pattern": RANKS,
                           "alpha_pattern": {"experts.gate_up_proj": 2}} | EXPERTS]),
    "one parameter": (mixtral, [ONE, ONE | {"r": 3}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[Path]]]:
    """A model, and two adapters for it that PEFT wrote."""
    make, configs = PAIRS[request.param]
    folders = []
    for n, config in enumerate(configs):
        model = get_peft_model(make(), LoraConfig(**config))
        torch.manual_seed(n)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.3)
        folders.append(tmp_path_factory.mktemp("pair") / f"a{n}")
        model.save_pretrained(folders[-1])
    return make, folders


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("pair", PAIRS, indirect=True)
@pytest.mark.parametrize("words", [(0.7, -0.4), (1.0, 1.0), (0.0, 1.5)])
def test_peft_gives_with_the_baked_folder_what_it_gives_with_both_parts(
    pair: tuple[Any, list[Path]], tmp_path: Path, words: tuple[float, float]
) -> None:
    make, folders = pair
    ids = torch.tensor([[0, 1, 4, 7, 10, 3]])
    both = peft_model(make(), folders)
    both.base_model.set_adapter(["a0", "a1"])
    for module in both.modules():
        if isinstance(module, LoraLayer):
            for name, scale in zip(("a0", "a1"), words, strict=True):
                module.set_scale(name, scale)
    baked = LoraStack([(load(folder), scale) for folder, scale in zip(folders, words, strict=True)]).bake()
    folder = save(baked, tmp_path / "baked")
    one = peft_model(make(), [folder])
    with torch.no_grad():
        plain, expected, found = (
            getattr(y, "logits", y) for y in (m(input_ids=ids) for m in (make().eval(), both, one))
        )
    assert (expected - plain).abs().max() > 0.02
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


# ---- errors


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(ArgumentError, match="the stack is empty, so there is nothing to bake; push an adapter first"):
        LoraStack().bake()


def test_every_extra_of_every_adapter_is_listed() -> None:
    one = Factor.of(np.ones(8, np.float32), "x")
    plain = LoadedLora.from_tensors({Q0: (np.ones((1, 7)), np.ones((8, 1)))}, name="plain")
    dora = replace(plain, name="dora", extras={"dora": {Q0: one}, "bias": {Q0[:-6] + "bias": one, "b": one}})
    saved = replace(plain, name="saved", extras={"modules_to_save": {"lm_head.weight": one}, "base_weight": {"e": one}})
    with pytest.raises(UnsupportedError, match="3 problems") as caught:
        LoraStack([(dora, 1.0), (plain, 1.0), (saved, 0.0)]).bake()
    starts = ["dora: dora, a DoRA magnitude", "dora: bias, a trained bias", "saved: modules_to_save, a whole module"]
    assert all(line.startswith(start) for line, start in zip(caught.value.problems, starts, strict=True))
    assert "(2 of them, such as" in caught.value.problems[1]
    assert "leave it out with without_extras('modules_to_save')" in caught.value.problems[2]
    kept = LoraStack([(lora.without_extras(), 1.0) for lora in (dora, plain, saved)])
    assert kept.bake().adapters[Q0].rank == 3


def test_every_weight_on_whose_shape_adapters_disagree_is_listed() -> None:
    one = LoadedLora.from_tensors({n: (np.ones((1, 7)), np.ones((8, 1))) for n in (Q0, Q1, UP0)}, name="one")
    shapes = {Q0: (7, 9), Q1: (7, 8), UP0: (6, 8)}
    two = LoadedLora.from_tensors({n: (np.ones((2, i)), np.ones((o, 2))) for n, (i, o) in shapes.items()}, name="two")
    with pytest.raises(
        ShapeError, match="the adapters cannot be baked, they were made for different bases: 2 problems"
    ) as caught:
        LoraStack([(one, 1.0), (two, 1.0)]).bake()
    assert "one: linear 7 -> 8" in caught.value.problems[0]
    assert "two: linear 7 -> 9" in caught.value.problems[0]
    assert caught.value.problems[1] == f"{UP0}: one: linear 7 -> 8; two: linear 6 -> 8"


def test_adapters_for_different_architectures_are_refused() -> None:
    lora = LoadedLora.from_tensors({"blk.0.attn_q.weight": (np.ones((1, 7)), np.ones((8, 1)))})
    llama, qwen = (replace(lora, metadata={"general.architecture": arch}) for arch in ("llama", "qwen2"))
    with pytest.raises(
        NamingError, match=r"name different architectures(.|\n)*architecture llama(.|\n)*architecture qwen2"
    ):
        LoraStack([(llama, 1.0), (qwen, 1.0)]).bake()


@pytest.mark.parametrize("base", [HF, GGUF])
def test_all_that_does_not_fit_the_base_is_listed(base: BaseModel) -> None:
    names = (Q0, Q1, "model.layers.7.mlp.up_proj.weight") if base is HF else (
        "blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.7.ffn_up.weight")  # fmt: skip
    lora = LoadedLora.from_tensors({n: (np.ones((1, 7)), np.ones((8 + (n == names[1]), 1))) for n in names})
    with pytest.raises(NamingError, match=f"the stack does not fit base {base.name}: 2 problems") as caught:
        LoraStack([(lora, 1.0)]).bake(base=base)
    assert list(caught.value.problems) == [
        f"lora: weight {names[1]} is [8, 7] in the base, this adapter changes [9, 7]",
        f"lora: weight {names[2]} is none of the base's 4 weights",
    ]


def test_the_second_list_needs_a_base_and_layers() -> None:
    stack = LoraStack()
    stack.push_adapter(Mine(0))
    with pytest.raises(
        ArgumentError, match=r"1 adapters are known by \(target module, layer\) only; give bake\(\) the base"
    ):
        stack.bake()

    class Layerless:
        rank, alpha, target_modules = 2, 5.0, (TargetModule.QUERY_PROJ,)

        def delta(self, target: TargetModule, layer: int) -> LoraDelta | None:
            return None

    stack = LoraStack()
    stack.push_adapter(Layerless())
    with pytest.raises(UnsupportedError, match="Layerless has no ``layers``, so its weights cannot be listed"):
        stack.bake(base=HF)


def test_places_that_the_base_lacks_are_listed() -> None:
    small = BaseModel("m", "hf", "LlamaForCausalLM", dict(HF.config), {Q0: (8, 7)})
    stack = LoraStack()
    stack.push_adapter(Mine(0))
    with pytest.raises(NamingError, match="Mine does not fit base m: 2 problems") as caught:
        stack.bake(base=small)
    assert list(caught.value.problems) == [
        "q_proj of layer 1 is none of the base's weights", "up_proj of layer 0 is none of the base's weights",
    ]  # fmt: skip


def test_baking_reads_nothing_and_changes_nothing() -> None:
    def never() -> np.ndarray:
        raise AssertionError("a factor was read")

    lazy = LoraDelta(Factor((2, 7), STORED[0], never, "a"), Factor((8, 2), STORED[0], never, "b"))
    lora = LoadedLora.from_tensors({Q0: lazy})
    stack = LoraStack([(lora, 0.5), (lora, 0.25)])
    baked = stack.bake(base=HF, name="mixed")
    assert (baked.name, baked.num_adapters(), baked.rank) == ("mixed", 1, 4)
    assert stack.names == ("lora", "lora#2")
    assert LoraStack([(lora, 1.0)]).bake().name == "lora"
    assert stack.bake().name == "lora+lora#2"
