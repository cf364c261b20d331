"""The card of a folder: README.md as the hub reads it, which says what an adapter is, made of what, how to load it.

No path of this machine is in it: of adapters their names, of models what others may be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from lorastack.core.adapter import LoadedLora
from lorastack.errors import printable, shown
from lorastack.files import CARD, FIGURES, signed
from lorastack.formats.provenance import Ingredient, ingredients_of
from lorastack.formats.said_base import base_of
from lorastack.hub import hub_id, told
from lorastack.markdown import in_a_cell, picture, table

#: Library -> what loads the folder, given the base and the place as texts of Python.
_LOADED = {
    "peft": """from peft import PeftModel

model = PeftModel.from_pretrained(model, {place})  # model: {base}""",
    "diffusers": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base})
pipeline.load_lora_weights({place})""",
    "mlx": """from mlx_lm import generate, load

model, tokenizer = load({base}, adapter_path={place})""",
}
_CAUSAL = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {place})"""
#: Of how an adapter was made, what is said in sentences.
_TOLD = ("error", "finetuned", "base")
#: Where a folder is loaded from, of which nobody knows yet where it will be.
SOMEWHERE = "path/of/this/folder"


class Figure(NamedTuple):
    """A figure of a card: its file's name, its title, what it shows in words, and the picture, SVG.

    One that a sentence says has neither file nor picture.
    """

    file: str | None
    title: str
    said: str
    picture: str = ""


def write_card(folder: Path, text: str, figures: Sequence[Figure]) -> None:
    """Write README.md and its pictures into a folder, each signed as ours."""
    (folder / CARD).write_bytes(signed(text))
    drawn = [one for one in figures if one.file]
    if drawn:
        (folder / FIGURES).mkdir()
    for one in drawn:
        (folder / FIGURES / str(one.file)).write_bytes(signed(one.picture))


def adapter_card(
    lora: LoadedLora, library: str, recipe: bool, place: str = SOMEWHERE, figures: Sequence[Figure] = ()
) -> str:
    """The text of README.md of an adapter's folder.

    Parameters
    ----------
    library
        What reads the folder: ``"peft"``, ``"diffusers"`` or ``"mlx"``.
    recipe
        Whether the file of weights holds the recipe.
    place
        Where the folder is loaded from; the text of one that is saved does not depend on where.
    figures
        What is drawn beside it, in the folder ``figures``.
    """
    base = base_of(lora)
    ranks = sorted({delta.rank for delta in lora.adapters.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    weights = "one weight" if lora.num_adapters() == 1 else f"{lora.num_adapters()} weights"
    lines = [
        *front_matter(library, base, ("lora", "lorastack")),
        f"# {in_a_cell(lora.name)}",
        "",
        f"A LoRA adapter of rank {rank} for {weights}" + (f" of {base}." if base else "."),
        *_made_of(lora),
        *settings(lora.made),
        *lost(lora.made),
        "",
        "## Use",
        "",
        *_use(lora, library, base, place),
    ]
    if recipe and not any(one.in_memory for one in ingredients_of(lora)):
        lines += ["", "How it was made, with the hashes of all files, is kept as a recipe in its file of weights:"]
        lines += ["`lorastack inspect --json` shows it, and saved as a `.toml` file it makes the adapter again."]
    if figures:
        lines += ["", "## Figures"]
    for one in figures:
        lines += ["", picture(one.file and f"{FIGURES}/{one.file}", one.title, one.said)]
    return "\n".join(lines) + "\n"


def front_matter(library: str | None, base: str | None, tags: Iterable[str]) -> list[str]:
    """What the hub reads of a card, and an empty line; the base is an id, in which nothing needs an escape."""
    lines = [f"library_name: {library}"] * bool(library) + [f'base_model: "{base}"'] * bool(base)
    return ["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def ingredients(made_of: Sequence[Ingredient]) -> list[str]:
    """The adapters as the lines of a table: their names, where others find them, their scales, what was changed."""
    rows = [(_named(one), f"{one.scale:g}", ", ".join(f"{step} {shown(to)}" for step, to in one.steps))
            for one in made_of]  # fmt: skip
    changed = any(steps for _, _, steps in rows)
    return table(("adapter", "scale", "changed")[: 2 + changed], [row[: 2 + changed] for row in rows])


def settings(made: Mapping[str, Any]) -> list[str]:
    """How it was made, as the lines of a paragraph; what there is for each weight is left out."""
    said = [f"{key} {in_a_cell(_written(value))}" for key, value in made.items()
            if key not in _TOLD and not isinstance(value, dict) and _written(value)]  # fmt: skip
    return ["", f"Settings: {', '.join(said)}."] if said else []


def lost(made: Mapping[str, Any]) -> list[str]:
    """What was cut off, as the lines of a paragraph; none where nothing was."""
    if "error" not in made:
        return []
    said = f"The norm of what was cut off is {made['error']:.3g} of the norm of the whole"
    if each := made.get("errors"):
        worst = max(each, key=each.__getitem__)
        said += f"; at worst {each[worst]:.3g}, at {in_a_cell(worst)}"
    return ["", f"{said}."]


def _written(value: object) -> str:
    """A setting: of lists, those of numbers only."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) if all(isinstance(one, (int, float)) for one in value) else ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(one: Ingredient) -> str:
    name, found = one.name or told(one.source), hub_id(one.source)
    return f"{name} ({found})" if found and found != name else name


def _made_of(lora: LoadedLora) -> list[str]:
    if "finetuned" in lora.made:
        tuned, base = (in_a_cell(told(str(lora.made[key]))) for key in ("finetuned", "base"))
        return ["", f"It is the difference of {tuned} and its base {base}, extracted with LoraStack."]
    parts = ingredients_of(lora)
    if not lora.origin and lora.source is None:
        return []
    said = "It is the sum of these, baked" if len(parts) > 1 else "It is this one, written"
    beside = ["", "Nothing was cut off: its ranks are those of all, side by side."]
    whole = len(lora.origin) > 1 and "error" not in lora.made
    return ["", f"{said} with LoraStack:", "", *ingredients(parts), *(beside if whole else [])]


def _use(lora: LoadedLora, library: str, base: str | None, place: str) -> list[str]:
    causal = library == "peft" and lora.metadata.get("task_type") == "CAUSAL_LM"
    code = _CAUSAL if causal else _LOADED[library]
    called = _text("the base") if causal or library != "peft" else "the base"
    named = (_text(base) if causal or library != "peft" else base) if base else called
    return ["```python", code.format(base=named, place=_text(place)), "```"]


def _text(value: str) -> str:
    """A text as Python writes it, on one line."""
    return orjson.dumps(printable(value)).decode()
