"""Check: which adapters of a library vLLM can serve on a base, and the command that serves their mixtures."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from lorastack.base import open_base
from lorastack.errors import LoraStackError
from lorastack.fleet.baking import Baking
from lorastack.fleet.library import Library
from lorastack.fleet.settings import MAX_RANK
from lorastack.mixture import Mixture
from lorastack.targets import VLLM_RANKS, program_of, room_for

GENERAL, ENDPOINTS = "vllm.general_plugins", "vllm.endpoint_plugins"
#: Of these vLLM loads every plugin there is, unless VLLM_PLUGINS names those it may.
_LOADED = (GENERAL, "vllm.io_processor_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")
OWN = ("lorastack", "lorastack_endpoint")


@dataclass(frozen=True)
class Checked:
    """One adapter or recipe of a library; ``rank`` where it can be served, else ``problem``."""

    name: str
    rank: int | None = None
    problem: str | None = None


def check(base: str | Path, library: Library) -> list[Checked]:
    """Every adapter of the library, its numbers read: NaN and what does not fit the base are found here.

    Raises
    ------
    FormatError
        When the base is none.
    """
    model = open_base(base)
    baking = Baking(model, "vllm")
    found = []
    for name in library.names():
        try:
            lora = baking.bake(library.recipe(Mixture(((name, 1.0),))), name, model)
            for delta in lora.adapters.values():
                for factor in delta.factors:
                    factor.take()  # not kept: a library is larger than one adapter
            found.append(Checked(name, lora.rank))
        except LoraStackError as error:
            found.append(Checked(name, problem=str(error)))
    return found


def rank_for(checked: Collection[Checked], parts: int) -> tuple[int, int]:
    """(rank of the widest mixture of so many adapters, the --max-lora-rank that holds it or as much as vLLM can).

    >>> rank_for([Checked("a", 8), Checked("b", 16), Checked("c", problem="NaN")], 2)
    (24, 32)
    """
    ranks = sorted((one.rank for one in checked if one.rank is not None), reverse=True)
    widest = sum(ranks[:parts])
    return widest, max(MAX_RANK, room_for(program_of("vllm"), widest) or VLLM_RANKS[-1])


def plugins(environment: Mapping[str, str], endpoint: bool) -> list[str] | None:
    """What VLLM_PLUGINS has to name; None where it may stay unset, and vLLM loads all there are.

    Endpoint plugins are loaded only when they are named, and then nothing else is that is not. So those that would be
    loaded without that variable are named too.
    """
    said = environment.get("VLLM_PLUGINS")
    if said is None and not endpoint:
        return None
    others = (
        [name for name in said.split(",") if name]
        if said is not None
        else [one.name for group in _LOADED for one in entry_points(group=group)]
    )
    return list(dict.fromkeys([*OWN[: 2 if endpoint else 1], *others]))


def command(
    base: str | Path, library: Library, rank: int, slots: int, names: Collection[str] | None, cache: str | Path | None
) -> str:
    """The line that starts vLLM, as a shell takes it.

    ``slots`` is how many mixtures there can be in one batch; twice as many are kept in memory.
    """
    said = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",  # without it vLLM asks no resolver
        "LORASTACK_LIBRARY": str(library.folder),
        "LORASTACK_MAX_RANK": str(rank),
        **({"LORASTACK_CACHE": str(cache)} if cache else {}),
        **({"VLLM_PLUGINS": ",".join(names)} if names is not None else {}),
    }
    words = [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots),
        "--max-cpu-loras", str(2 * slots), "--api-server-count", "1",
    ]  # fmt: skip
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in said.items()), shlex.join(words)])
