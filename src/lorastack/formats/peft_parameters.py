"""Parameters: which tensor of a module its factors belong to, where a PEFT config has ``target_parameters``.

PEFT wraps a module once for each parameter targeted, in the order in which the module has them: the first is the
innermost, ``experts.base_layer.lora_A``; with one there is no ``base_layer``. A target with an owner,
``experts.down_proj``, is that parameter of a module called so; one without, as PEFT writes for models whose experts
were layers once, is that parameter of every module that has it. It is never an ordinary layer: no layer is both.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from lorastack.core.delta import Kind
from lorastack.core.patterns import Matcher, PatternError
from lorastack.errors import Problems
from lorastack.formats.peft_config import PeftConfig

#: The order in which modules of experts have their parameters; other pairs cannot be told apart without the base.
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "v1", "down_proj", "w2")
_WRAPPED = ".base_layer"
#: From this version on factors of experts are those of the weight as the module uses it; before, as ``[E, in, out]``.
_TURNED_IN = (0, 19)


def inner_to_outer(parameters: Collection[str]) -> list[str] | None:
    """The parameters of one module as PEFT nests them; None where their order is not known.

    >>> inner_to_outer(["down_proj", "gate_up_proj"])
    ['gate_up_proj', 'down_proj']
    """
    if len(parameters) > 1 and not set(parameters) <= set(ORDER):
        return None
    return sorted(parameters, key=lambda name: ORDER.index(name) if name in ORDER else 0)


class Parameters:
    """What ``target_parameters`` says of the modules of one file."""

    def __init__(self, config: PeftConfig, where: object, problems: Problems) -> None:
        self._config, self._where, self._problems = config, where, problems
        self._wanted: dict[str, list[str] | None] = {}
        self._is_layer = _layers_of(config.raw.get("target_modules"))

    def of(self, module: str, modules: Collection[str]) -> str | None:
        """The parameter that a module's factors belong to; None: its weight. ``modules`` are all that have factors."""
        if not self._config.target_parameters:
            return None
        holder = module
        while holder.endswith(_WRAPPED):
            holder = holder.removesuffix(_WRAPPED)
        if holder not in self._wanted:
            self._wanted[holder] = self._of_holder(holder, modules)
        wanted = self._wanted[holder]
        if not wanted:
            return None
        depth = (len(module) - len(holder)) // len(_WRAPPED)
        if depth >= len(wanted):
            self._problems.add(f"{self._where}: module {module}: more factors than target_parameters {wanted}")
            return None
        return f"{holder}.{wanted[len(wanted) - 1 - depth]}"

    def kind(self, rows: int, rank: int, square: bool) -> tuple[Kind, bool]:
        """The kind of a parameter's factors by the rows of A, and whether they are to be turned over.

        Where the shapes do not tell which way round factors of experts are, the version that wrote them does.
        """
        if rows == rank:
            return "stored", False
        return ("stored", True) if square and not self._is_of_today() else ("experts", False)

    def _is_of_today(self) -> bool:
        version = re.match(r"(\d{1,4})\.(\d{1,4})(?!.*dev)", str(self._config.raw.get("peft_version") or ""))
        return version is not None and (int(version[1]), int(version[2])) >= _TURNED_IN

    def _of_holder(self, holder: str, modules: Collection[str]) -> list[str] | None:
        """The parameters of a module, the innermost first; none for an ordinary layer."""
        owned, anyones = [], []
        for target in self._config.target_parameters:
            owner, _, short = target.rpartition(".")
            if not owner:
                anyones.append(short)
            elif f".{holder}".endswith(f".{owner}"):
                owned.append(short)
        depth = 0
        while holder + _WRAPPED * depth in modules:
            depth += 1
        owned, every = list(dict.fromkeys(owned)), list(dict.fromkeys(owned + anyones))
        if not owned and (not anyones or (depth < 2 and self._is_layer(holder))):
            return None
        wanted = owned if len(owned) == depth else every
        if depth < len(wanted):
            said = inner_to_outer(wanted) or wanted
            self._problems.add(
                f"{self._where}: module {holder} has fewer factors than target_parameters {said}; save it again"
            )
            return None
        ordered = inner_to_outer(wanted)
        if ordered is None:
            self._problems.add(
                f"{self._where}: module {holder} has several target_parameters {wanted}; which factors belong to which "
                f"depends on the base's own order, known here only for {', '.join(ORDER)}"
            )
        return ordered


def _layers_of(targets: Any) -> Any:
    """Whether a module is one of the ordinary layers that ``target_modules`` names.

    Where it names none by list or pattern, whatever is not called experts is one.
    """
    if isinstance(targets, list):
        endings = tuple(f".{target}" for target in targets)
        return lambda module: f".{module}".endswith(endings)
    if isinstance(targets, str) and targets.lower() != "all-linear":
        try:
            return Matcher(f"re:{targets}")
        except PatternError:
            pass
    return lambda module: "expert" not in module.rpartition(".")[2]
