"""Read PEFT folders: adapter_config.json with adapter_model.safetensors (or the old adapter_model.bin)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lorastack.core.adapter import LazyDeltas, LoadedLora
from lorastack.core.delta import Kind, LoraDelta, misfit
from lorastack.core.factor import Factor
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.peft_config import CONFIG_NAME, PeftConfig, parse_config
from lorastack.formats.safetensors_file import FLOATS, Info, SafetensorsFile
from lorastack.formats.torch_bin import TorchBin

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
#: Where a file of ours keeps what it was made of, in the weights' own metadata: PEFT warns of fields it does not know.
RECIPE_KEY = "lorastack.recipe"
OLD_WEIGHTS = "adapter_model.bin"

Tensors = SafetensorsFile | TorchBin


def load(
    folder: Path,
    raw: dict[str, Any],
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    weights: Path | None = None,
) -> LoadedLora:
    """Open a PEFT folder: config and header are checked, the factors stay in the mapped file.

    ``raw`` is the content of its adapter_config.json; ``weights`` names the safetensors file when it is
    not the usual one.
    """
    label = str(folder / CONFIG_NAME)
    problems = Problems(f"cannot load {folder}")
    config = parse_config(raw, label, problems, ignore)
    if config is None:
        problems.raise_any(FormatError)
    assert config is not None
    tensors = SafetensorsFile(weights) if weights else _open_tensors(folder)
    sorter = _Sorter(tensors, config, allow_nonfinite, problems)
    sorter.sort()
    problems.raise_any(FormatError)
    if recipe := tensors.metadata.get(RECIPE_KEY):
        raw = {**raw, RECIPE_KEY: recipe}
    return LoadedLora(
        name=name or os.path.basename(os.path.abspath(folder)),
        adapters=LazyDeltas(sorter.how, sorter.build),
        extras=MappingProxyType(sorter.extras),
        metadata=MappingProxyType(raw),
        naming="hf",
        source=folder,
        file_alpha=config.alpha,
    )


def _open_tensors(folder: Path) -> Tensors:
    if (path := folder / WEIGHTS).is_file():
        return SafetensorsFile(path)
    if (path := folder / OLD_WEIGHTS).is_file():
        return TorchBin(path)
    raise FormatError(f"{folder}: it has {CONFIG_NAME}, but neither {WEIGHTS} nor {OLD_WEIGHTS}; fetch it whole")


#: Ending of a key -> which part of a module's adapter it is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".token_adapter.trainable_tokens_delta": "new_tokens",
}


class _Sorter:
    """Sorts a file's keys into updates (``how``: weight name -> how to build it) and ``extras``."""

    def __init__(self, tensors: Tensors, config: PeftConfig, allow_nonfinite: bool, problems: Problems) -> None:
        self.tensors, self.config, self.allow, self.problems = tensors, config, allow_nonfinite, problems
        self.how: dict[str, tuple[str, str, float, Kind, int]] = {}
        self.extras: dict[str, dict[str, Any]] = {}

    def sort(self) -> None:
        rest: list[str] = []
        b_keys = 0
        tensors, how = self.tensors.tensors, self.how
        config = self.config
        rank, scaling = config.rank, config.scaling_of("")
        plain = config.uniform and not config.target_parameters
        # Most of opening a file is this loop, so what nearly every key is comes first and is checked in place.
        nothing: Info = ("", (), 0, 0)
        for key, (dtype, shape, _, _) in tensors.items():
            ending = key[-14:]
            if ending == ".lora_B.weight":
                b_keys += 1
                continue
            if plain and ending == ".lora_A.weight" and key[:17] == PREFIX and len(shape) == 2:
                key_b = key[:-13] + "lora_B.weight"
                dtype_b, shape_b, _, _ = tensors.get(key_b, nothing)
                if (
                    dtype in FLOATS
                    and dtype_b in FLOATS
                    and len(shape_b) == 2
                    and shape[0] == rank == shape_b[1]
                    and shape[1]
                    and shape_b[0]
                ):
                    how[key[17:-13] + "weight"] = (key, key_b, scaling, "linear", rank)
                    continue
            rest.append(key)
        if rest or b_keys != len(how):
            self._sort_rest(rest)
        self._check_extras()
        if not how and not self.problems:
            self.problems.add(f"{self.tensors.path}: it has no lora_A/lora_B tensors, so it would change nothing")

    def _sort_rest(self, rest: list[str]) -> None:
        """What the fast loop left: unusual modules, extras, halves without the other, foreign tensors."""
        paired = {one[1] for one in self.how.values()}
        rest += [key for key in self.tensors.tensors if key.endswith(".lora_B.weight") and key not in paired]
        parts: dict[str, dict[str, str]] = {"a": {}, "b": {}, "embedding_a": {}, "embedding_b": {}}
        others: list[tuple[str, str]] = []
        for key in rest:
            if not key.startswith(PREFIX):
                self._refuse(key)
                continue
            part, module = _split(key[17:])
            if part in parts:
                parts[part][module] = key
            else:
                others.append((key, part))
        self._pair(parts["a"], parts["b"], ("lora_A", "lora_B"), embedding=False)
        self._pair(parts["embedding_a"], parts["embedding_b"], ("lora_embedding_A", "lora_embedding_B"), embedding=True)
        for key, part in others:
            self._extra(key, part)

    def build(self, _: str, how: tuple[str, str, float, Kind, int]) -> LoraDelta:
        key_a, key_b, scaling, kind, rank = how
        a, b = self.tensors.factor(key_a, self.allow), self.tensors.factor(key_b, self.allow)
        if kind == "experts":
            a, b = _experts(a, b, rank)
        return LoraDelta(a, b, scaling, kind)

    def _pair(self, a: dict[str, str], b: dict[str, str], names: tuple[str, str], embedding: bool) -> None:
        where = self.tensors.path
        for module in a.keys() ^ b.keys():
            has, lacks = names if module in a else names[::-1]
            self.problems.add(f"{where}: module {module} has {has} but no {lacks}; save the adapter again")
        for module, key_a in a.items():
            key_b = b.get(module)
            if key_b is None:
                continue
            (dtype_a, shape_a, *_), (dtype_b, shape_b, *_) = self.tensors.tensors[key_a], self.tensors.tensors[key_b]
            for key, dtype in ((key_a, dtype_a), (key_b, dtype_b)):
                if dtype not in FLOATS:
                    self.problems.add(f"{where}: tensor {key} is {dtype}, expected a float type")
            kind: Kind = "embedding" if embedding else "linear" if len(shape_a) == 2 else "conv"
            weight = module + ".weight"
            parameter = self._parameter(module, a) if self.config.target_parameters else None
            # PEFT looks a parameter up by its own name, in the patterns too.
            rank, scaling = self.config.rank_of(parameter or module), self.config.scaling_of(parameter or module)
            if parameter:
                weight, kind = parameter, "experts" if shape_a and shape_a[0] != rank else "linear"
            self._check_shapes(module, shape_a, shape_b, rank, kind)
            if weight in self.how:
                self.problems.add(f"{where}: weight {weight} has two updates, by {self.how[weight][0]} and {key_a}")
            self.how[weight] = (key_a, key_b, scaling, kind, rank)

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...], rank: int, kind: Kind) -> None:
        where = self.tensors.path
        if kind == "experts":
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
                self.problems.add(
                    f"{where}: module {module}: lora_A {a} and lora_B {b} do not hold experts of rank {rank}"
                )
            return
        if problem := misfit(a, b, kind):
            self.problems.add(f"{where}: module {module}: {problem}")
        elif a[0] != rank:
            self.problems.add(
                f"{where}: module {module}: lora_A is {a}, rank {a[0]}; {CONFIG_NAME} says rank {rank} "
                "(r or rank_pattern), on which the scaling depends; correct the config"
            )

    def _parameter(self, module: str, modules: Collection[str]) -> str | None:
        """The parameter that a module's factors belong to under ``target_parameters``; None: its weight.

        PEFT wraps a module once for each parameter targeted, in the module's own order: the first is the
        innermost, ``experts.base_layer.lora_A``. With one target there is no ``base_layer``.
        """
        holder = module
        while holder.endswith(".base_layer"):
            holder = holder.removesuffix(".base_layer")
        depth = (len(module) - len(holder)) // len(".base_layer")
        wanted = []
        for parameter in self.config.target_parameters:
            owner, _, short = parameter.rpartition(".")
            if holder == owner or holder.endswith("." + owner) or not owner:
                wanted.append(short)
        wanted = list(dict.fromkeys(wanted))
        if not wanted:
            return None
        # The order of registration in transformers' expert modules; other pairs cannot be told apart without the base.
        order = ["gate_up_proj", "gate_proj", "up_proj", "down_proj"]
        if len(wanted) > 1:
            if not set(wanted) <= set(order):
                self.problems.add(
                    f"{self.tensors.path}: module {holder} has several target_parameters {wanted}; which factors "
                    "belong to which depends on the base's own order, known here only for gate_up_proj and down_proj"
                )
                return None
            wanted.sort(key=order.index)
        if any(holder + ".base_layer" * n not in modules for n in range(len(wanted))):
            self.problems.add(
                f"{self.tensors.path}: module {holder} has fewer factors than target_parameters {wanted}; "
                "save the adapter again"
            )
            return None
        if depth >= len(wanted):
            self.problems.add(f"{self.tensors.path}: module {module}: more factors than target_parameters {wanted}")
            return None
        return f"{holder}.{wanted[len(wanted) - 1 - depth]}"

    def _extra(self, key: str, part: str) -> None:
        module = _split(key[17:])[1]
        weight = module + ".weight"
        factor = self._float_factor(key)
        if factor is None:
            return
        if part in ("dora", "lora_bias"):
            self._keep(part, weight, factor, key)
        elif part == "new_tokens":
            self._keep(part, weight, (self._token_ids(module, factor.shape), factor), key)
        elif "lora_" in key or "token_adapter" in key:
            self._refuse(key)
        else:
            kind, own = self._saved_kind(key[17:])
            self._keep(kind, own, factor, key)

    def _keep(self, kind: str, name: str, value: Any, key: str) -> None:
        kept = self.extras.setdefault(kind, {})
        if name in kept:
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
        if own.endswith(".bias") and self.config.raw.get("bias", "none") != "none":
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

    def _check_extras(self) -> None:
        raw, where = self.config.raw, self.tensors.path
        for field, kind in (("use_dora", "dora"), ("lora_bias", "lora_bias")):
            have, want = set(self.extras.get(kind, ())), set(self.how) if raw.get(field) else set()
            for weight in sorted(want - have):
                self.problems.add(f"{where}: {field} is set, but {weight} has no {kind}; save the adapter again")
            for weight in sorted(have - want):
                why = "has no lora_A and lora_B" if raw.get(field) else f"comes without {field} in {CONFIG_NAME}"
                self.problems.add(f"{where}: the {kind} of {weight} {why}")
            for weight in sorted(have & want):
                shape, out = self.extras[kind][weight].shape, self.tensors.tensors[self.how[weight][1]][1][:1]
                if out and math.prod(shape) != out[0]:
                    self.problems.add(f"{where}: the {kind} of {weight} is {shape}, its lora_B has {out[0]} rows")
        if raw.get("trainable_token_indices") and "new_tokens" not in self.extras:
            self.problems.add(f"{where}: trainable_token_indices is set, but no trainable_tokens_delta is in the file")
        if tokens := raw.get("alora_invocation_tokens"):
            self.extras["alora"] = {"invocation_tokens": tuple(tokens) if isinstance(tokens, list) else tokens}

    def _refuse(self, key: str) -> None:
        self.problems.add(f"{self.tensors.path}: tensor {key} is no part of a PEFT LoRA adapter known here")


def _split(name: str) -> tuple[str, str]:
    """(part, module path) of a key without its prefix; part is ``""`` for the base's own tensors."""
    for ending, part in _PARTS.items():
        if name.endswith(ending):
            return part, name[: -len(ending)]
    return "", name.rpartition(".")[0]


def _experts(a: Factor, b: Factor, rank: int) -> tuple[Factor, Factor]:
    """PEFT's two-dimensional storage as ``(E, rank, in)`` and ``(E, out, rank)``: in lora_B the expert runs fastest."""
    experts = a.shape[0] // rank
    out = b.shape[0]

    def split_a(array: np.ndarray) -> np.ndarray:
        return array.reshape(experts, rank, -1)

    def split_b(array: np.ndarray) -> np.ndarray:
        return array.reshape(out, rank, experts).transpose(2, 0, 1)

    return a.mapped(split_a, (experts, rank, a.shape[1])), b.mapped(split_b, (experts, out, rank))
