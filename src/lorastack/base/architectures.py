"""Architectures whose names and row order between Hugging Face and GGUF are known, listed one by one.

llama.cpp's converter reorders rows of some weights, and splits others (conversion/*.py there, ``modify_tensors``). An
adapter converted by the wrong rule loads and answers slightly wrong, so what is not listed is refused. Every line is
held against that converter: tests/fixtures/make_architectures.py. The rules themselves: `row_order`, `gguf_experts`,
`latent`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lorastack.errors import UnsupportedError

Rows = Literal["keep", "rotary", "fused", "groups"]


class Architecture(NamedTuple):
    """One Hugging Face model class and what its GGUF conversion does."""

    hf: str
    gguf: str
    #: "keep"; "rotary": rows of q and k interleaved by rotary pair; "fused": rows of a fused qkv by part, not head;
    #: "groups": rows of a fused qkv by part, not group of heads that share a key.
    rows: Rows = "keep"
    #: Prefix of the model's own weight names, which some files on the hub leave out; none where there are several.
    prefix: str = "model"
    #: How gate and up lie in the parameter of all experts: one half each, or row by row in turn.
    experts: Literal["halves", "turns"] = "halves"
    #: Whether all experts' parameter is ``[E, in, out]``, and PEFT's factors are those of it as it lies.
    as_it_lies: bool = False


_LISTED = (
    Architecture("LlamaForCausalLM", "llama", "rotary"),
    Architecture("MistralForCausalLM", "llama", "rotary"),
    Architecture("MixtralForCausalLM", "llama", "rotary"),
    Architecture("GraniteForCausalLM", "granite", "rotary"),
    Architecture("GraniteMoeForCausalLM", "granitemoe", "rotary"),
    Architecture("SmolLM3ForCausalLM", "smollm3", "rotary"),
    Architecture("OlmoForCausalLM", "olmo", "rotary"),
    Architecture("ArceeForCausalLM", "arcee", "rotary"),
    Architecture("Ministral3ForCausalLM", "mistral3", "rotary"),
    Architecture("Mistral3ForConditionalGeneration", "mistral3", "rotary", ""),
    Architecture("BambaForCausalLM", "granitehybrid", "rotary"),
    Architecture("Qwen2ForCausalLM", "qwen2"),
    Architecture("Qwen2MoeForCausalLM", "qwen2moe"),
    Architecture("Qwen2VLForConditionalGeneration", "qwen2vl"),
    Architecture("Qwen2_5_VLForConditionalGeneration", "qwen2vl"),
    Architecture("Qwen3ForCausalLM", "qwen3"),
    Architecture("Qwen3MoeForCausalLM", "qwen3moe"),
    Architecture("Qwen3VLForConditionalGeneration", "qwen3vl", prefix=""),
    Architecture("Qwen3VLMoeForConditionalGeneration", "qwen3vlmoe", prefix=""),
    Architecture("GemmaForCausalLM", "gemma"),
    Architecture("Gemma2ForCausalLM", "gemma2"),
    Architecture("Gemma3ForCausalLM", "gemma3"),
    Architecture("Gemma3nForCausalLM", "gemma3n"),
    Architecture("Gemma4ForCausalLM", "gemma4"),
    Architecture("Gemma4ForConditionalGeneration", "gemma4", prefix=""),
    Architecture("PhiForCausalLM", "phi2"),
    Architecture("Phi3ForCausalLM", "phi3"),
    Architecture("PhimoeForCausalLM", "phimoe"),
    Architecture("PhiMoEForCausalLM", "phimoe"),  # as the files on the hub call it
    Architecture("Olmo2ForCausalLM", "olmo2"),
    Architecture("Olmo3ForCausalLM", "olmo2"),
    Architecture("OlmoeForCausalLM", "olmoe"),
    Architecture("CohereForCausalLM", "command-r"),
    Architecture("Cohere2ForCausalLM", "cohere2"),
    Architecture("GlmForCausalLM", "chatglm"),
    Architecture("Glm4ForCausalLM", "glm4"),
    Architecture("Glm4vForConditionalGeneration", "glm4", prefix=""),
    Architecture("Glm4MoeForCausalLM", "glm4moe"),
    Architecture("SolarOpenForCausalLM", "glm4moe"),
    Architecture("StableLmForCausalLM", "stablelm"),
    Architecture("Starcoder2ForCausalLM", "starcoder2"),
    Architecture("GPTBigCodeForCausalLM", "starcoder", "keep", "transformer"),
    Architecture("MptForCausalLM", "mpt", "keep", "transformer"),
    Architecture("MPTForCausalLM", "mpt", "keep", "transformer"),  # as the files on the hub call it
    Architecture("GPT2LMHeadModel", "gpt2", "keep", "transformer"),
    Architecture("NemotronForCausalLM", "nemotron"),
    Architecture("Exaone4ForCausalLM", "exaone4"),
    Architecture("ExaoneMoeForCausalLM", "exaone-moe"),
    Architecture("SeedOssForCausalLM", "seed_oss"),
    Architecture("Ernie4_5ForCausalLM", "ernie4_5"),
    Architecture("Ernie4_5_MoeForCausalLM", "ernie4_5-moe"),
    Architecture("HunYuanDenseV1ForCausalLM", "hunyuan-dense"),
    Architecture("HunYuanMoEV1ForCausalLM", "hunyuan-moe"),
    Architecture("ApertusForCausalLM", "apertus"),
    Architecture("MiniCPM3ForCausalLM", "minicpm3"),
    Architecture("MiniMaxM2ForCausalLM", "minimax-m2"),
    Architecture("Jais2ForCausalLM", "jais2"),
    Architecture("JambaForCausalLM", "jamba"),
    Architecture("FalconH1ForCausalLM", "falcon-h1"),
    Architecture("AfmoeForCausalLM", "afmoe"),
    Architecture("Lfm2ForCausalLM", "lfm2"),
    Architecture("Lfm2MoeForCausalLM", "lfm2moe"),
    Architecture("Dots1ForCausalLM", "dots1"),
    Architecture("Llama4ForCausalLM", "llama4", as_it_lies=True),
    Architecture("Llama4ForConditionalGeneration", "llama4", prefix="", as_it_lies=True),
    Architecture("DeepseekV2ForCausalLM", "deepseek2"),
    Architecture("DeepseekV3ForCausalLM", "deepseek2"),
    Architecture("Glm4MoeLiteForCausalLM", "deepseek2"),
    Architecture("GptOssForCausalLM", "gpt-oss", experts="turns"),
    Architecture("BloomForCausalLM", "bloom", "fused", "transformer"),
    Architecture("GPTNeoXForCausalLM", "gptneox", "fused", "gpt_neox"),
    Architecture("FalconForCausalLM", "falcon", "groups", "transformer"),
)
BY_HF = {a.hf: a for a in _LISTED}
#: `model_type` of the text part -> the class that it is by itself, for models with pictures or sound beside it.
_BY_TEXT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
}
#: An architecture of GGUF stands for several classes with one rule.
BY_GGUF = {a.gguf: a for a in reversed(_LISTED)}

_STATE = "how the weights of its state-space layers are reordered is not settled"
_LINEAR = "how the heads of its linear attention are reordered is not settled"
_HYBRID = "whether the rows of q and k are interleaved depends on how the configuration spells its layers"
_ABSENT = "llama.cpp converts no such model, so that there is no GGUF of it"
#: Classes, and architectures of GGUF, that are refused for a reason of their own.
REFUSED = {
    "GraniteMoeHybridForCausalLM": _HYBRID,
    "granitehybrid": f"{_HYBRID}, and the file is of Bamba as well",
    **dict.fromkeys(
        "MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM NemotronHForCausalLM mamba mamba2 nemotron_h "
        "nemotron_h_moe".split(),
        _STATE,
    ),
    **dict.fromkeys(
        "Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM "
        "Qwen3_5MoeForConditionalGeneration qwen3next qwen35 qwen35moe".split(),
        _LINEAR,
    ),
    **dict.fromkeys(["MllamaForConditionalGeneration", "MllamaForCausalLM"], _ABSENT),
}
_INSTEAD = "use the adapter under its own names: attach it, or merge it into the Hugging Face base and convert that"


def architecture_of(name: str | None, naming: str, text_type: str | None = None) -> Architecture:
    """The listed architecture of that Hugging Face class or GGUF architecture.

    A class that wraps a text model (``text_type`` is its ``model_type``) is converted as that text model; a backbone
    saved by itself (``LlamaModel``) as the whole.

    Raises
    ------
    UnsupportedError
        When it is not listed.
    """
    table = BY_GGUF if naming == "gguf" else BY_HF
    if name in REFUSED:
        raise UnsupportedError(f"architecture {name!r}: {REFUSED[name]}, so names are not converted; {_INSTEAD}")
    if name in table:
        return table[name]
    if naming == "hf":
        stem = (name or "").removesuffix("Model")
        for other in (_BY_TEXT.get(text_type or ""), f"{stem}ForCausalLM", f"{stem}LMHeadModel"):
            if other in table:
                return table[other]
    raise UnsupportedError(
        f"architecture {name!r}: its row order between Hugging Face and GGUF is not known here, so names are not "
        f"converted; known are {', '.join(sorted(table))}"
    )
