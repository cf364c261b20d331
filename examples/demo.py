"""See adapters add up: the same prompts under the base, each adapter alone, and stacks at several scales.

Run: make demo
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from lorastack import LoraStack, load
from lorastack.torch import attach, attach_all
from lorastack.torch.generate import encode, generate, load_base

DEMO = Path(__file__).parent / "demo"
PROMPTS = ["Once upon a time there was a little", "There once was a brave"]
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    torch.set_num_threads(1)  # a model this small is faster without threads waiting for each other
    model, tokenizer = load_base(str(DEMO / "base"))
    # One GGUF file, as llama.cpp uses it, and two PEFT folders: attached side by side.
    excited, luna, robot = load(DEMO / "excited.gguf"), load(DEMO / "luna"), load(DEMO / "robot")

    def write(title: str, handle: object = None, mixtures: list[dict[str, float]] | None = None) -> list[str]:
        inputs = encode(tokenizer, PROMPTS)
        texts = generate(model, tokenizer, inputs, handle, mixtures, max_new_tokens=48, do_sample=False)
        console.print(f"\n[bold]{title}[/]")
        for n, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            own = f"[cyan]{mixtures[n]}[/] " if mixtures else ""
            console.print(f"  {own}[dim]{prompt}[/]{text}")
        return texts

    console.print("A model of 0.2 million parameters writes stories. Three adapters were trained on it:")
    console.print(
        "  excited (GGUF) ends every sentence with '!', luna calls every character Luna, robot turns all into robots."
    )
    write("the base")
    with attach_all(model, [(excited, 0.0), (luna, 0.0), (robot, 0.0)]) as handle:
        for scales in (
            {"excited": 1.0},
            {"luna": 1.0},
            {"robot": 1.0},
            {"excited": 1.0, "luna": 1.0},
            {"excited": 0.7, "luna": 0.7},
            {"excited": 1.0, "luna": 1.0, "robot": 1.0},
        ):
            handle.set_scales(dict.fromkeys(handle.names, 0.0) | scales)
            stacked = write(" + ".join(f"{scale:g} x {name}" for name, scale in scales.items()), handle)
        write("one batch, a mixture for every row", handle, [{"excited": 1.0}, {"luna": 0.8, "robot": 1.0}])
        stack = handle.stack  # all of it under the model's own names now
    write("the base again: nothing of the model was touched")

    with tempfile.TemporaryDirectory() as scratch:
        path = stack.bake().save(Path(scratch) / "all-three")
        size = sum(file.stat().st_size for file in path.iterdir())
        with attach(model, LoraStack([(load(path), 1.0)])) as handle:
            baked = write(f"all three baked into one PEFT adapter of {size / 1024:.0f} KiB", handle)
    console.print(f"\nThe baked adapter writes the same text as the stack: [bold]{baked == stacked}[/]")
    if len(sys.argv) > 1:
        _leave_playground(Path(sys.argv[1]))


def _leave_playground(folder: Path) -> None:
    """The demo's files where outputs may lie beside them, and what to type next."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    console.print(f"\nThe base and its adapters lie in [bold]{folder}[/] now. Type next:")
    console.print("  source .venv/bin/activate")
    console.print(f"  cd {folder}")
    console.print("  lorastack run base luna:0.7 excited.gguf:0.3 -p 'Once upon a time there was a little' -n 20")


if __name__ == "__main__":
    main()
