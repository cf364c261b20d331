"""Load a base with its tokenizer and continue prompts: what ``lorastack run`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorastack.core.dtypes import our_name
from lorastack.errors import ArgumentError, FormatError, require
from lorastack.torch.handle import Handle
from lorastack.ways import argument


def load_base(base: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder, a hub id, or a GGUF file through transformers' reader.

    Raises
    ------
    MissingDependencyError
        Without transformers.
    FormatError
        When transformers cannot load it.
    """
    at = usable_device(device)
    transformers: Any = require("transformers", "torch")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where, options = base, {}
    path = Path(base).expanduser()
    if path.is_file():
        where, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").exists():
        raise FormatError(f"base {base}: the folder has no config.json; give a Hugging Face folder or a GGUF file")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch_dtype(dtype), **options)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(f"base {base}: transformers cannot load it: {first}") from error
    return model.to(at).eval(), tokenizer


def torch_dtype(name: str) -> Any:
    """The torch dtype of ``f32``, ``f16``, ``bf16`` or a name of torch's own; ``auto`` is the file's."""
    if name.lower() == "auto":
        return "auto"
    short = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    found = getattr(torch, short.get(our_name(name), name.removeprefix("torch.")), None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"{argument('dtype')} {name!r} is not one of auto, f32, f16, bf16")
    return found


def usable_device(name: str) -> torch.device:
    """The device of that name, on which a number can be kept; ``auto`` is cuda or mps where there is one, else cpu.

    Raises
    ------
    ArgumentError
        When this machine, or this build of torch, has none of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend, of which there are many, raises its own
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(
            f"{argument('device')} {name!r} cannot be used with torch {torch.__version__} on this machine: {said}; "
            "auto takes the best there is"
        ) from error
    return device


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool = False, system: str | None = None) -> Any:
    """Prompts as one left-padded batch, through the chat template when ``chat`` is set."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not chat:
        return tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    if not tokenizer.chat_template:
        raise ArgumentError(
            f"the base's tokenizer has no chat template; leave {argument('chat')} out, or use a chat model"
        )
    opening = [{"role": "system", "content": system}] if system else []
    chats = [[*opening, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    handle: Handle | None = None,
    mixtures: Sequence[Mapping[str, float]] | None = None,
    streamer: Any = None,
    **options: Any,
) -> list[str]:
    """The continuation of every prompt, without the prompt; with ``mixtures`` each row has its own stack."""
    inputs = {key: value.to(model.device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    options = {"pad_token_id": tokenizer.pad_token_id, "streamer": streamer} | options
    with torch.no_grad():
        if handle is not None and mixtures is not None:
            with handle.rows(mixtures):
                tokens = model.generate(**inputs, **options)
        else:
            tokens = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    return tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
