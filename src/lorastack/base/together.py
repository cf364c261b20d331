"""Whether adapters are for one base, as far as they say themselves: by the bases they name, the weights they share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorastack.core.adapter import LoadedLora
from lorastack.errors import NamingError
from lorastack.formats.said_base import SAID
from lorastack.ways import MIXED, ways

_ARCHITECTURE = "general.architecture"
#: Endings of a name that tell how the same weights are stored, or who stored them so.
_STORED = re.compile(
    r"[-_.](unsloth|bnb|nf4|[48]-?bits?|int[48]|fp8|gptq|awq|gguf|hqq|mlx|i?q[2-8](_[a-z0-9]{1,9}){0,4})$"
)
#: No name of a base is longer.
_LONGEST = 400
#: The layer's number in a weight's name.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
#: The folder of a repository in the hub's cache, above snapshots that are named by hashes.
_CACHED = re.compile(r"(?:^|/)models--(?:[^/]*--)?([^/]+)/snapshots/")


def check_together(entries: Sequence[tuple[str, LoadedLora]]) -> None:
    """Refuse adapters, each with its name, that name different bases or have nothing to do with each other.

    Weights in common join adapters, and so does a base that both name: one may change attention only and the other
    the rest. Who makes adapters in memory names weights at will: names of numbered layers join those too.

    Raises
    ------
    NamingError
        Listing every adapter with its base and its number of weights.
    """
    entries = [(name, lora) for name, lora in entries if lora.adapters]
    why = None
    for said in ("base", _ARCHITECTURE):
        named = {key for _, lora in entries if (key := _key(lora, said))}
        if len(named) > 1:
            why = f"the adapters name different {'bases' if said == 'base' else 'architectures'}"
            break
    if not why and (groups := _groups(entries)) > 1:
        why = "the adapters share no weight" + (f" between {groups} groups of them" if len(entries) > 2 else "")
    if why:
        raise NamingError(f"{why}, so they are hardly for one model{ways(*MIXED)}", [_line(*one) for one in entries])


def base_key(name: str) -> str:
    """What two names of one base have in common, however it was reached or stored; empty where it says nothing.

    >>> base_key("unsloth/Llama-3.2-1B-bnb-4bit"), base_key("/data/models/llama-3.2-1b/"), base_key("Org/GPT2@main")
    ('llama-3.2-1b', 'llama-3.2-1b', 'gpt2')
    """
    if len(name) > _LONGEST:
        return name
    path = name.replace("\\", "/").rstrip("/")
    if cached := _CACHED.search(path + "/"):
        path = cached[1]
    last = path.rpartition("/")[2].partition("@")[0].casefold().strip()
    last = last.removesuffix(".gguf")
    while (shorter := _STORED.sub("", last)) != last:  # one by one: an ending may be another's part
        last = shorter
    return last.strip(".")


def _key(lora: LoadedLora, said: str) -> str:
    if said != "base":
        return str(lora.metadata.get(said) or "")
    if any(step == "names" for step, _ in lora.history):
        return ""  # the base its names were converted with was the caller's choice, wherever that lies
    return next((key for field in SAID if (key := base_key(str(lora.metadata.get(field) or "")))), "")


def _groups(entries: Sequence[tuple[str, LoadedLora]]) -> int:
    """How many groups of adapters there are that nothing joins."""
    groups: list[set[tuple[str, str]]] = []
    for marks in filter(None, (_marks(lora) for _, lora in entries)):
        joined = [group for group in groups if group & marks]
        groups = [group for group in groups if not group & marks] + [marks.union(*joined)]
    return len(groups)


def _marks(lora: LoadedLora) -> set[tuple[str, str]]:
    """What joins an adapter with others that have it too; empty where it says nothing."""
    marks = {(said, key) for said in ("base", _ARCHITECTURE) if (key := _key(lora, said))}
    if lora.source is not None:
        marks.add(("file", str(lora.source)))  # views of one file are for one base
    elif not marks:
        layers = {("layers", name[: number.start()]) for name in lora.adapters if (number := _NUMBER.search(name))}
        if not layers:
            return set()
        marks |= layers
    return marks | {("weight", name) for name in lora.adapters}


def _line(name: str, lora: LoadedLora) -> str:
    said = next((str(lora.metadata[field]) for field in SAID if lora.metadata.get(field)), None)
    architecture = lora.metadata.get(_ARCHITECTURE)
    words = [f"base {said}" if said else "", f"architecture {architecture}" if architecture else ""]
    base = ", ".join(word for word in words if word) or "no base named"
    count = len(lora.adapters)
    return f"{name}: {base}; {count} weight{'s' if count != 1 else ''} such as {next(iter(lora.adapters))}"
