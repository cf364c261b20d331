"""Seeds: small sound inputs of every target, made by the real writers. All fuzzing starts from them."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Q
from safetensors.numpy import save as save_safetensors

from lorastack import LoadedLora, LoraStack, save
from tests.fuzz.peers import PREFIX

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "target_modules": ["q_proj", "emb"],
    "rank_pattern": {"k_proj": 3},
    "alpha_pattern": {"k_proj": 6},
    "modules_to_save": ["head"],
    "init_lora_weights": True,
    "layers_pattern": None,
}
SHAPES = {
    "q_proj.lora_A.weight": (2, 6),
    "q_proj.lora_B.weight": (5, 2),
    "k_proj.lora_A.weight": (3, 6),
    "k_proj.lora_B.weight": (5, 3),
    "emb.lora_embedding_A": (2, 9),
    "emb.lora_embedding_B": (4, 2),
    "conv.lora_A.weight": (2, 3, 3, 3),
    "conv.lora_B.weight": (4, 2, 1, 1),
    "head.weight": (3, 4),
}
LAYER = "model.layers.0.self_attn"
BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 5, "intermediate_size": 4}  # fmt: skip


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """The tensors of a PEFT adapter with a bit of everything."""
    rng = np.random.default_rng(0)
    made = {PREFIX + key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    made[PREFIX + "q_proj.lora_A.weight"] = made[PREFIX + "q_proj.lora_A.weight"].astype(np.float16)
    return made


def config() -> bytes:
    """Its adapter_config.json."""
    return json.dumps(CONFIG).encode()


def plain_config() -> bytes:
    """The configuration of an adapter of one rank, as most are."""
    return b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'


def safetensors() -> bytes:
    """Its adapter_model.safetensors."""
    return save_safetensors(arrays(), {"said": 'a "b" \n c'})


def pair(module: str = f"{LAYER}.q_proj") -> dict[str, np.ndarray]:
    """The factors of one module."""
    rng = np.random.default_rng(1)
    return {f"{PREFIX}{module}.lora_{part}.weight": rng.standard_normal(shape).astype(np.float32)
            for part, shape in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip


@functools.cache
def pickled() -> tuple[bytes, ...]:
    """What torch.save makes of it, as an archive and as it did before; nothing without torch."""
    try:
        import torch
    except ImportError:
        return ()
    state = {key: torch.from_numpy(array.copy()) for key, array in arrays().items()}
    saved = []
    for inner, archive in ((state, True), ({"state_dict": state, "epoch": 3}, True), (state, False)):
        stream = io.BytesIO()
        torch.save(inner, stream, _use_new_zipfile_serialization=archive)
        saved.append(stream.getvalue())
    return tuple(saved)


#: The weights of a small image model that `images` are for.
IMAGE_BASE = {
    "unet.down_blocks.0.resnets.0.conv1.weight": (6, 4, 3, 3),
    "unet.mid_block.attentions.0.proj_in.weight": (6, 4),
    "transformer.transformer_blocks.0.attn.to_q.weight": (2, 4),
    "transformer.transformer_blocks.0.attn.to_k.weight": (2, 4),
    "transformer.transformer_blocks.0.attn.to_v.weight": (2, 4),
    "text_encoder.encoder.layers.0.mlp.fc1.weight": (6, 4),
}


@functools.cache
def images() -> tuple[bytes, ...]:
    """Files as kohya, LyCORIS, ComfyUI and diffusers write them, of many parts each."""
    rng = np.random.default_rng(2)

    def file(metadata: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> bytes:
        made = {key.replace("__", "."): rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        return save_safetensors(made, metadata)

    def halves(module: str, out: int = 6, wide: int = 4, kernel: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
        ones = (1,) * len(kernel)
        return {f"{module}__lora_down__weight": (2, wide, *kernel), f"{module}__lora_up__weight": (out, 2, *ones),
                f"{module}__alpha": ()}  # fmt: skip

    tags = {"ss_network_dim": "2", "ss_tag_frequency": '{"1_a": {"a": 3, "b": 1}}'}
    kohya = halves("lora_unet_mid_block_attentions_0_proj_in") | halves("lora_te_text_model_encoder_layers_0_mlp_fc1")
    conv, fused = "lora_unet_down_blocks_0_resnets_0_conv1", "diffusion_model__double_blocks__0__img_attn__qkv"
    loha = {f"x_a__hada_w{n}_{h}": shape for n in "12" for h, shape in (("a", (6, 2)), ("b", (2, 4)))}
    lokr = {"x_b__lokr_w1": (2, 2), "x_b__lokr_w2_a": (3, 1), "x_b__lokr_w2_b": (1, 2),
            "x_c__lokr_w1": (2, 2), "x_c__lokr_w2": (3, 2), "x_d__diff": (6, 4), "x_d__diff_b": (6,)}  # fmt: skip
    lycoris = {f"lora_unet_{key}": shape for key, shape in (loha | lokr).items()}
    configs = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"x": 3},
                                                    "unet.use_dora": True})}  # fmt: skip
    attn = "unet__mid_block__attentions__0__proj_in"
    parts = {
        f"{attn}__lora_A__weight": (2, 4),
        f"{attn}__lora_B__weight": (6, 2),
        f"{attn}__lora_magnitude_vector": (6,),
    }
    return (
        file(tags, **kohya, **halves(conv, kernel=(3, 3)), **{f"{conv}__dora_scale": (6, 1, 1, 1)}),
        file(**lycoris, lora_unet_x_a__alpha=()),
        file(**halves(fused)),
        file(configs, **parts),
        file(**{f"{attn.replace('__', '.')}.processor.to_{n}_lora.{p}.weight": s for n in ("q", "out")
                for p, s in (("down", (2, 4)), ("up", (6, 2)))}),
    )  # fmt: skip


def mlx_config() -> bytes:
    """The adapter_config.json of an MLX adapter."""
    said = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 3.5, "keys": ["q"]}}
    return json.dumps({**said, "model": "m", "use_dora": True}).encode()


@functools.cache
def mlx() -> bytes:
    """Its adapters.safetensors."""
    rng = np.random.default_rng(3)
    shapes = {f"{LAYER}.q_proj.lora_a": (8, 2), f"{LAYER}.q_proj.lora_b": (2, 8), f"{LAYER}.q_proj.m": (8,),
              "model.layers.0.mlp.switch_mlp.up_proj.lora_a": (3, 2, 4),
              "model.layers.0.mlp.switch_mlp.up_proj.lora_b": (3, 5, 2)}  # fmt: skip
    return save_safetensors({key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()})


def index() -> bytes:
    """The index of its two shards, `shards`."""
    where = {key: name for name, raw in shards().items() for key in json.loads(raw[8 : 8 + raw[0] + 256 * raw[1]])}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": where}).encode()


@functools.cache
def shards() -> dict[str, bytes]:
    """The files of an adapter in two parts, by name."""
    first, second = pair(), pair(f"{LAYER}.v_proj")
    name = "adapter_model-0000{}-of-00002.safetensors"
    return {name.format(n): save_safetensors(one) for n, one in ((1, first), (2, second))}


@functools.cache
def gguf_adapter() -> bytes:
    """A GGUF adapter with a bit of everything."""
    shapes = {
        "blk.0.attn_q.weight": (Q.F32, (2, 6), (5, 2)),
        "token_embd.weight": (Q.F16, (9, 2), (4, 2)),
        "blk.1.ffn_up.weight": (Q.Q8_0, (32, 32), (2, 32)),
        "blk.1.ffn_up_exps.weight": (Q.BF16, (2, 3, 4), (2, 5, 3)),
    }

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        writer.add_string("adapter.lora.task_name", "tale")
        writer.add_array("adapter.alora.invocation_tokens", [3, 4])
        writer.add_array("x.names", ["a", "bc"])
        rng = np.random.default_rng(0)
        for name, (kind, shape_a, shape_b) in shapes.items():
            for part, shape in (("lora_a", shape_a), ("lora_b", shape_b)):
                array = rng.standard_normal(shape).astype(np.float32)
                writer.add_tensor(f"{name}.{part}", gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.add_tensor("output_norm.weight", np.ones(3, np.float32))

    return _written("adapter", fill)


@functools.cache
def small_gguf() -> bytes:
    """A GGUF adapter of the one weight that the bases have."""

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        for part, array in zip("ab", pair().values(), strict=True):
            writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", array)

    return _written("adapter", fill)


@functools.cache
def gguf_base() -> bytes:
    """A GGUF base of two weights."""

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_head_count_kv(2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
        writer.add_tensor("token_embd.weight", np.ones((5, 32), np.float16))

    return _written("model", fill)


def _written(kind: str, fill: Callable[[gguf.GGUFWriter], None]) -> bytes:
    """The bytes of a GGUF file for llama, of an adapter or a model, with what ``fill`` puts into it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type(kind)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def base_weights() -> bytes:
    """The weights of a Hugging Face base, in one file."""
    return save_safetensors({f"{LAYER}.q_proj.weight": np.ones((8, 8), np.float32),
                             "model.embed_tokens.weight": np.ones((5, 8), np.float32)})  # fmt: skip


def base_index() -> bytes:
    """The index that names this file."""
    names = (f"{LAYER}.q_proj.weight", "model.embed_tokens.weight")
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}).encode()


@functools.cache
def own_files() -> tuple[bytes, ...]:
    """GGUF files as this library writes them, the recipe inside included."""
    made = LoadedLora.from_tensors({"blk.0.attn_q.weight": tuple(pair().values())}, alpha=3, naming="gguf")
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("f32", "bf16"):
            baked = LoraStack([(made, 0.5), (made, -2.0)]).bake(name="both")
            path = save(baked, Path(folder) / f"{dtype}.gguf", dtype=dtype, architecture="llama")
            written.append(path.read_bytes())
    return tuple(written)


RECIPES = (
    b"""base = "b"
[[adapter]]
source = "x"
scale = 0.5
name = "zara"
select = "re:.*q_proj.*"
[[adapter]]
source = "y.gguf"
[[adapter.steps]]
scales = { "blk.*.attn_q.weight" = 2, "re:blk\\\\.[0-3]\\\\..*" = 0.25 }
[[adapter.steps]]
rename = { "" = "a" }
[[adapter.steps]]
without_extras = ["norm"]
[adapter.sha256]
"x" = "00"
[lorastack]
method = "cat"
""",
    b'[[adapter]]\nsource = "a.toml"\nscale = -2\n#@ a.toml\n[[adapter]]\nsource = "in.toml"\n',
)
MIXTURES = (b"x:0.7\ny.gguf:-1e3", b"r.toml:2\nx", b"C:/loras/zara.gguf\nzara:0.7\nx:nan\n~nobody/x:1\n:1")
PATTERNS = (b"q_proj\nmodel.layers.0.q_proj", b"^model\\.(.*)\\.[qk]_proj\nmodel.a.q_proj\nmodel.k_proj",
            b"layers\\.(?:[0-9]|1[0-5])\\..*\\b\nlayers.12.x", b"(?=(a+))\\1b\naab", b"blk.[!0]*.weight\nblk.1.weight",
            b"(a+)+b\naaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")  # fmt: skip
KEYS = tuple(
    "\n".join(lines).encode()
    for lines in (
        [f"{PREFIX}{LAYER}.q_proj.lora_A.weight", f"{PREFIX}{LAYER}.q_proj.lora_B.weight"],
        [f"_orig_mod.module.{PREFIX}x.lora_{part}.default.weight" for part in "AB"],
        [f"x._fsdp_wrapped_module.lora_{part}.weight" for part in "AB"] + ["x.lora_magnitude_vector.default.weight"],
        [f"{PREFIX}emb.lora_embedding_{part}.default" for part in "AB"]
        + [f"{PREFIX}emb.token_adapter.trainable_tokens_delta", f"{PREFIX}head.modules_to_save.default.weight"],
        [f"{PREFIX}l.0.experts.base_layer.lora_{part}.weight" for part in "AB"]
        + [f"{PREFIX}l.0.experts.lora_{part}.weight" for part in "AB"] + [f"{PREFIX}l.0.q.base_layer.weight"],
    )
)  # fmt: skip
HUB = (b"owner/name", b"owner/name/sub/folder@main", b"owner/name@refs/pr/1", b"x", b"x/sub@../..", b"~nobody/x")


def base_config() -> bytes:
    """The config.json of this base."""
    return json.dumps(BASE).encode()


def pickle_archive(pickled: bytes) -> bytes:
    """An archive as torch.save writes it, with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as parts:
        for name, content in (("a/data.pkl", pickled), ("a/version", b"3\n"), ("a/byteorder", b"little")):
            parts.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()
