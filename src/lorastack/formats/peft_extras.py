"""What a PEFT file holds beside low-rank updates: each tensor sorted by kind, and checked against the config."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lorastack.core.factor import Factor
from lorastack.errors import Problems, shown
from lorastack.formats.peft_config import CONFIG_NAME, PeftConfig
from lorastack.formats.peft_keys import FOREIGN, PREFIX, split
from lorastack.formats.safetensors_file import FLOATS
from lorastack.formats.tensors import Tensors


class ExtraSorter:
    """Sorts tensors that are no factors into ``found``: kind -> the base's own name -> value.

    ``how`` has the updates by weight, the key of their lora_B second.
    """

    def __init__(
        self,
        tensors: Tensors,
        config: PeftConfig,
        how: Mapping[str, tuple[Any, ...]],
        allow_nonfinite: bool,
        problems: Problems,
    ) -> None:
        self.tensors, self.config, self.how = tensors, config, how
        self.allow, self.problems = allow_nonfinite, problems
        self.found: dict[str, dict[str, Any]] = {}

    def take(self, key: str, part: str) -> None:
        """Sort the tensor ``key``, which is this ``part`` of a module."""
        module = split(key[17:])[1]
        weight = module + ".weight"
        if 0 in self.tensors.tensors[key][1]:
            refuse_empty(key, self.tensors, self.problems)
            return
        if key.endswith(".num_batches_tracked"):  # a counter, which changes nothing but further training
            return
        factor = self._float_factor(key)
        if factor is None:
            return
        if part in ("dora", "lora_bias"):
            self._keep(part, weight, factor, key)
        elif part == "new_tokens":
            self._keep(part, weight, (self._token_ids(module, factor.shape), factor), key)
        elif FOREIGN.search(key[17:]) and not self.config.saves(key[17:]):
            refuse(key, self.tensors, self.problems)
        else:
            kind, own = self._saved_kind(key[17:])
            self._keep(kind, own, factor, key)

    def check(self) -> None:
        """Compare what was found with what the config and the updates ask for."""
        raw, where = self.config.raw, self.tensors.path
        for field, kind in (("use_dora", "dora"), ("lora_bias", "lora_bias")):
            have, want = set(self.found.get(kind, ())), set(self.how) if raw.get(field) else set()
            for weight in sorted(want - have):
                self.problems.add(f"{where}: {field} is set, but {weight} has no {kind}; save the adapter again")
            for weight in sorted(have - want):
                why = "has no lora_A and lora_B" if raw.get(field) else f"comes without {field} in {CONFIG_NAME}"
                self.problems.add(f"{where}: the {kind} of {weight} {why}")
            for weight in sorted(have & want):
                shape, out = self.found[kind][weight].shape, self.tensors.tensors[self.how[weight][1]][1][:1]
                if out and math.prod(shape) != out[0]:
                    self.problems.add(f"{where}: the {kind} of {weight} is {shape}, its lora_B has {out[0]} rows")
        if raw.get("trainable_token_indices") and "new_tokens" not in self.found:
            self.problems.add(f"{where}: trainable_token_indices is set, but no trainable_tokens_delta is in the file")
        if tokens := raw.get("alora_invocation_tokens"):
            self.found["alora"] = {"invocation_tokens": tuple(tokens)}

    def _keep(self, kind: str, name: str, value: Any, key: str) -> None:
        kept = self.found.setdefault(kind, {})
        # With a resized vocabulary PEFT saves a module twice, under its own name and as `.modules_to_save.`.
        if name in kept and not _same(kept[name], value):
            self.problems.add(f"{self.tensors.path}: tensor {key} is a second {kind} of {name}")
        kept[name] = value

    def _float_factor(self, key: str) -> Factor | None:
        dtype = self.tensors.tensors[key][0]
        if dtype in FLOATS:
            return self.tensors.factor(key, self.allow)
        self.problems.add(f"{self.tensors.path}: tensor {key} is {dtype}, expected a float type")
        return None

    def _saved_kind(self, name: str) -> tuple[str, str]:
        """Kind and the base's own key of a tensor that belongs to the base itself."""
        own = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".modules_to_save." in name or self.config.saves(own):
            return "modules_to_save", own
        if "bias" in own.rpartition(".")[2] and self.config.raw.get("bias", "none") != "none":
            return "bias", own
        if ".base_layer." in name or own in self.how:
            return "base_weight", own
        return "modules_to_save", own

    def _token_ids(self, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The token ids of the trained rows of one embedding."""
        rows = shape[0] if len(shape) == 2 else -1
        said = self.config.raw.get("trainable_token_indices")
        if isinstance(said, dict):
            said = next((ids for key, ids in said.items() if module == key or module.endswith("." + key)), None)
        if not isinstance(said, list) or len(said) != rows or not all(type(i) is int and i >= 0 for i in said):
            self.problems.add(
                f"{self.tensors.path}: module {module} has trained token rows of shape {shape}, "
                f"{CONFIG_NAME} names the tokens {shown(said)} (trainable_token_indices)"
            )
            return ()
        return tuple(said)


def frozen(keys: Collection[str], modules: Collection[str], config: PeftConfig) -> list[str]:
    """Those of the keys beside the factors of ``modules`` that are the base's own tensors, which were not trained.

    They are the originals of saved modules; and, in a whole model's state dict, all that the config does not name.
    PEFT itself saves the own weight of no targeted layer but an embedding or a head, so that one in a numbered
    layer tells a whole state dict.
    """
    names = {key: key[17:] for key in keys if key.startswith(PREFIX)}
    own = {_owner(name) for name in names.values() if name.endswith(("weight", ".base_layer.qweight"))}
    targets = {_owner(module + ".base_layer.") for module in modules}
    whole = any(target in own and re.search(r"\.\d+\.", target) for target in targets)
    return [
        key
        for key, name in names.items()
        if _is_original(name) or (whole and not _is_trained(name, targets, config) and not _is_part(name))
    ]


def _is_original(name: str) -> bool:
    return ".original_module." in name or ".token_adapter.base_layer." in name


def _is_part(name: str) -> bool:
    return bool(split(name)[0] or FOREIGN.search(name))


def _is_trained(name: str, targets: Collection[str], config: PeftConfig) -> bool:
    """Whether the config says of one of the base's own tensors that it was trained."""
    biases = config.raw.get("bias", "none")
    if name.endswith(".bias") and (biases == "all" or (biases == "lora_only" and _owner(name) in targets)):
        return True
    return ".modules_to_save." in name or config.saves(name)


def _owner(name: str) -> str:
    """The module that a base's tensor belongs to, without PEFT's wrappers."""
    holder, inner, _ = name.partition(".base_layer.")
    return holder if inner else name.rpartition(".")[0]


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same bytes."""
    if not isinstance(one, Factor) or not isinstance(other, Factor):
        return False
    alike = one.shape == other.shape and one.stored == other.stored
    return alike and one.raw().tobytes() == other.raw().tobytes()


def refuse_empty(key: str, tensors: Tensors, problems: Problems) -> None:
    """Note a tensor without elements: what was trained is not in the file."""
    problems.add(
        f"{tensors.path}: tensor {key} is empty, a dimension is 0: {list(tensors.tensors[key][1])}; ZeRO-3 saved it "
        "without gathering it; save again with stage3_gather_16bit_weights_on_model_save, save_16bit_model or "
        "zero_to_fp32.py"
    )


def refuse(key: str, tensors: Tensors, problems: Problems) -> None:
    """Note a tensor that has no place here."""
    problems.add(f"{tensors.path}: tensor {key} is no part of a PEFT LoRA adapter known here")
