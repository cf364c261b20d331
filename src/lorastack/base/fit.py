"""Whether an adapter fits a base: every weight there, of the right shape, for the right architecture."""

from __future__ import annotations

from lorastack.adapter import LoadedLora
from lorastack.base.model import BaseModel
from lorastack.base.names import convert_names
from lorastack.delta import LoraDelta
from lorastack.errors import LoraStackError


def misfits(lora: LoadedLora, base: BaseModel) -> list[str]:
    """Everything of ``lora`` that has no place in ``base``, a line each; empty when it fits.

    Names of the other kind are converted first, where the base allows it.
    """
    found = []
    said = lora.metadata.get("general.architecture")
    if lora.naming == base.naming == "gguf" and said != base.architecture_name:
        found.append(f"it is for architecture {said!r}, the base is {base.architecture_name!r}")
    if lora.naming != base.naming:
        try:
            lora = convert_names(lora, base, base.naming)
        except LoraStackError as error:
            return found + list(error.problems or [str(error)])
    for name, delta in lora.adapters.items():
        shape = base.shapes.get(name)
        if shape is None:
            found.append(f"weight {name} is none of the base's {len(base.shapes)} weights")
        elif shape not in _shapes(delta, base):
            wanted = " or ".join(str(list(s)) for s in _shapes(delta, base))
            found.append(f"weight {name} is {list(shape)} in the base, this adapter changes {wanted}")
    return found


def _shapes(delta: LoraDelta, base: BaseModel) -> list[tuple[int, ...]]:
    """The shapes of a base weight that the update fits."""
    n_in, n_out = delta.in_features, delta.out_features
    if delta.kind == "embedding":
        return [(n_in, n_out)]
    if delta.kind == "conv":
        return [(n_out, *delta.factors[0].shape[1:])]
    if delta.kind == "experts":
        experts = delta.num_experts or 0
        return list(dict.fromkeys([(experts, n_out, n_in), (experts, n_in, n_out)]))
    # transformers' Conv1D, which only GPT-2 and its kin use, keeps its weight [in, out].
    conv1d = base.naming == "hf" and base.architecture_name in ("GPT2LMHeadModel", "GPT2Model")
    return [(n_in, n_out) if conv1d else (n_out, n_in)]
