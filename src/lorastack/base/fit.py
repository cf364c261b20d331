"""Whether an adapter fits a base: every weight there, of the right shape, for the right architecture."""

from __future__ import annotations

from lorastack.base.model import BaseModel
from lorastack.base.names import convert_names
from lorastack.core.adapter import LoadedLora
from lorastack.errors import LoraStackError


def misfits(lora: LoadedLora, base: BaseModel) -> list[str]:
    """Everything of ``lora`` that has no place in ``base``, a line each; empty when it fits.

    Names of the other kind are converted first, where the base allows it.
    """
    found = []
    said = lora.metadata.get("general.architecture")
    if said and lora.naming == base.naming == "gguf" and said != base.architecture_name:
        found.append(f"it is for architecture {said!r}, the base is {base.architecture_name!r}")
    if lora.naming != base.naming:
        try:
            lora = convert_names(lora, base, base.naming)
        except LoraStackError as error:
            return found + list(error.problems or [str(error)])
    for name, delta in lora.adapters.items():
        if name not in base.shapes:
            found.append(f"weight {name} is none of the base's {len(base.shapes)} weights")
        elif problem := base.misfit(name, delta):
            found.append(problem)
    return found
