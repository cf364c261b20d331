"""Train the demo: a tiny model that tells stories, and three adapters whose effect one can read.

    python examples/train_demo.py --out examples/demo

It needs torch, transformers, peft and gguf, and not lorastack: what is tested against these files was made
without it.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_corpus import BASE, EXCITED, LUNA, ROBOT, Voice, stories
from demo_gguf import write_adapter, write_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

NAME = "lorastack-demo-base"
PROMPTS = ("Once upon a time there was a little", "There once was a brave", "This is the story of a clever")
BEGIN, END = "<s>", "<|endoftext|>"  # GPT-2's own end: readers of its kind of tokenizer add it if it is missing
IGNORED = -100  # the label that the loss of transformers skips
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Plan:
    """What one training run reads and for how long."""

    name: str
    voice: Voice
    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    batch: int = 32


BASE_PLAN = Plan("base", BASE, steps=1800, learning_rate=4e-3, weight_decay=0.1, batch=20)
ADAPTERS: tuple[tuple[Plan, LoraConfig], ...] = (
    (
        Plan("excited", EXCITED, steps=250, learning_rate=3e-3, batch=16),
        LoraConfig(r=4, lora_alpha=8, target_modules=ALL_SEVEN, task_type="CAUSAL_LM"),
    ),
    (
        Plan("luna", LUNA, steps=250, learning_rate=2e-3, batch=16),
        LoraConfig(r=8, lora_alpha=16, target_modules=ALL_SEVEN, task_type="CAUSAL_LM"),
    ),
    (
        Plan("robot", ROBOT, steps=250, learning_rate=2e-3, batch=16),
        LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=ALL_SEVEN, task_type="CAUSAL_LM"),
    ),
)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(stories(20_000, BASE, options.seed))
    base = LlamaForCausalLM(base_config(tokenizer))
    base.name_or_path = NAME  # what PEFT writes as the adapters' base
    train(base, tokenizer, BASE_PLAN, options.seed)
    save_base(options.out, base, tokenizer)
    show(base, tokenizer)

    for plan, lora in ADAPTERS:
        adapted = get_peft_model(copy.deepcopy(base), lora)
        train(adapted, tokenizer, plan, options.seed + 1)
        save_adapter(options.out, adapted, plan.name)
        show(adapted, tokenizer)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and order (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use (default: 2)")
    return parser.parse_args()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, so that any text can be encoded and comes back unchanged."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
    )
    # Nothing is unknown to bytes; but where a file names no such token, readers invent one.
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BEGIN, eos_token=END, pad_token=END, unk_token=END)


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=0.1)
    start, average = time.perf_counter(), None
    model.train()
    progress = tqdm(batches(tokenizer, plan, seed), total=plan.steps, desc=plan.name, mininterval=1)
    for inputs, labels in progress:
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}")
    model.eval()
    print(f"{plan.name}: loss {average:.3f} after {time.perf_counter() - start:.0f} s")


def batches(tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One story a row, padded on the right: under causal attention no row sees its padding."""
    texts = stories(plan.steps * plan.batch, plan.voice, seed)
    random.Random(seed).shuffle(texts)
    for begin in range(0, len(texts), plan.batch):
        rows = tokenizer([text + tokenizer.eos_token for text in texts[begin : begin + plan.batch]]).input_ids
        width = max(map(len, rows))
        inputs = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        labels = [row + [IGNORED] * (width - len(row)) for row in rows]
        yield torch.tensor(inputs), torch.tensor(labels)


def save_base(out: Path, base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    write_model(out / "base.gguf", base, tokenizer, NAME)


def save_adapter(out: Path, adapted: PeftModel, name: str) -> None:
    """The excited one goes to llama.cpp's format, so that the demo stacks two formats."""
    if name == "excited":
        alpha = adapted.peft_config["default"].lora_alpha
        weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        write_adapter(out / f"{name}.gguf", weights, alpha, adapted.get_base_model().config, name)
        return
    adapted.save_pretrained(out / name, save_embedding_layers=False)
    (out / name / "README.md").unlink()  # PEFT's empty model card


def show(model: LlamaForCausalLM | PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        print(" ", tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
