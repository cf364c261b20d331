"""Read PEFT folders: adapter_config.json with adapter_model.safetensors (or the old adapter_model.bin)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import Kind, LoraDelta, misfit
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas
from lorastack.errors import FormatError, LoraStackWarning, Problems
from lorastack.formats.companions import companions
from lorastack.formats.opened import OpenedFile
from lorastack.formats.peft_config import CONFIG_NAME, PeftConfig, parse_config
from lorastack.formats.peft_extras import ExtraSorter, frozen, refuse, refuse_empty
from lorastack.formats.peft_files import open_folder, open_weights
from lorastack.formats.peft_keys import PREFIX, is_inside, may_be_wrapped, plain_keys, split
from lorastack.formats.peft_parameters import Parameters
from lorastack.formats.peft_variants import block_diagonal, is_of_training
from lorastack.formats.safetensors_file import FLOATS, Info
from lorastack.formats.tensors import Renamed, Tensors
from lorastack.ways import ignoring, ways

Shape = tuple[int, ...]
#: Where a file of ours keeps what it was made of, in the weights' own metadata: PEFT warns of fields it does not know.
RECIPE_KEY = "lorastack.recipe"
#: Where an adapter's metadata keeps what was done to read its file, for `lorastack.inspect`.
NOTES_KEY = "lorastack.notes"


def load(
    config_file: OpenedFile,
    raw: dict[str, Any],
    name: str | None = None,
    allow_nonfinite: bool = False,
    ignore: Collection[str] = (),
    weights: OpenedFile | None = None,
) -> LoadedLora:
    """Open a PEFT folder: config and header are checked, the factors stay in the file.

    ``raw`` is the content of its adapter_config.json; ``weights`` is the file of weights when it is not the
    usual one.
    """
    folder, label = config_file.path.parent, str(config_file)
    problems = Problems(f"cannot load {folder}")
    config = parse_config(raw, label, problems, ignore)
    if config is None:
        problems.raise_any(FormatError)
    assert config is not None
    tensors = open_weights(weights) if weights else open_folder(folder)
    sorter = _Sorter(tensors, config, allow_nonfinite, problems)
    sorter.sort()
    problems.raise_any(FormatError)
    if recipe := tensors.metadata.get(RECIPE_KEY):
        raw = {**raw, RECIPE_KEY: recipe}
    opened = (config_file, *tensors.files)
    notes = (*sorter.tensors.notes, *sorter.notes, *_unread(folder, [file.path for file in opened], ignore))
    if notes:
        raw = {**raw, NOTES_KEY: notes}
    return LoadedLora(
        name=name or os.path.basename(os.path.abspath(folder)),
        adapters=LazyDeltas(sorter.how, sorter.build),
        extras=MappingProxyType(sorter.extras.found),
        metadata=MappingProxyType(raw),
        naming="hf",
        source=weights.path if weights else folder,
        opened=opened,
        file_alpha=config.alpha,
    )


def _unread(folder: Path, files: Collection[Path], ignore: Collection[str]) -> list[str]:
    """Say in a warning which files beside the adapter hold more of what was trained."""
    unread = {name: said for name, said in companions(folder, files).items() if name not in ignore}
    for name, said in unread.items():
        warnings.warn(
            f"{folder}: {said}; the adapter alone may not do what was trained"
            + ways("load that file yourself", ignoring(name, "if it does without")),
            LoraStackWarning,
            stacklevel=4,
        )
    return list(unread.values())


class _Sorter:
    """Sorts a file's keys into updates (``how``: weight name -> how to build it) and extras."""

    def __init__(self, tensors: Tensors, config: PeftConfig, allow_nonfinite: bool, problems: Problems) -> None:
        self.tensors, self.config, self.allow, self.problems = tensors, config, allow_nonfinite, problems
        #: weight -> keys of A and B, scaling, kind, the rank of experts or 0, whether they are the other way round.
        self.how: dict[str, tuple[str, str, float, Kind, int, bool]] = {}
        self.parameters = Parameters(config, tensors.path, problems)
        self.extras = ExtraSorter(tensors, config, self.how, allow_nonfinite, problems)
        self.notes: tuple[str, ...] = ()

    def sort(self) -> None:
        rest = self._sort_plain()
        if rest or may_be_wrapped(self.how):
            keys = plain_keys(self.tensors.tensors, self.tensors.path, self.problems)
            if keys:
                self.tensors = self.extras.tensors = Renamed(self.tensors, keys.stored, keys.notes)
                rest = self._sort_plain()
        if rest:
            self._sort_rest(rest)
        if isinstance(self.tensors, Renamed):
            self._count_twice(self.tensors)
        self.extras.check()
        if not self.how and not self.problems:
            self.problems.add(f"{self.tensors.path}: it has no lora_A/lora_B tensors, so it would change nothing")

    def _count_twice(self, tensors: Renamed) -> None:
        """Double what PEFT adds twice: of a whole `nn.MultiheadAttention` the update of its output projection.

        Its ``MultiheadAttention.merge`` adds it, and then calls the projection's own ``merge``, in every forward pass,
        those of the training included.
        """
        for weight, (key_a, key_b, scaling, *more) in list(self.how.items()):
            if is_inside(tensors.stored[key_a]):
                self.how[weight] = (key_a, key_b, 2 * scaling, *more)  # type: ignore[assignment]
                self.notes += (f"{weight}: PEFT adds it twice, as part of a whole attention; so it is here",)

    def _sort_plain(self) -> list[str]:
        """Sort what nearly every key is; returns the keys that are something else, or not as expected."""
        uniform = self.config.uniform and not self.config.target_parameters
        self.how.clear()
        if uniform and self._all_in_pairs():
            return []
        rest: list[str] = []
        b_keys: list[str] = []
        tensors, how = self.tensors.tensors, self.how
        how.clear()
        rank, scaling = self.config.rank, self.config.scaling_of("")
        nothing: Info = ("", (), 0, 0)
        for key, (dtype, shape, _, _) in tensors.items():
            ending = key[-14:]
            if ending == ".lora_B.weight":
                b_keys.append(key)
                continue
            if uniform and ending == ".lora_A.weight" and key[:17] == PREFIX and len(shape) == 2:
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
                    how[key[17:-13] + "weight"] = (key, key_b, scaling, "linear", 0, False)
                    continue
            rest.append(key)
        paired = {one[1] for one in how.values()}
        return rest + [key for key in b_keys if key not in paired]

    def _all_in_pairs(self) -> bool:
        """Sort a file that is nothing but pairs of linear factors, side by side; False if it is not.

        Most of opening a file is this loop, so what is checked is checked in place.
        """
        how, (rank, scaling) = self.how, (self.config.rank, self.config.scaling_of(""))
        items = iter(self.tensors.tensors.items())
        for (key, (dtype, shape, _, _)), (key_b, (dtype_b, shape_b, _, _)) in zip(items, items, strict=False):
            stem = key[17:-13]
            if (
                key[-14:] != ".lora_A.weight"
                or key_b != f"{PREFIX}{stem}lora_B.weight"
                or key[:17] != PREFIX
                or dtype not in FLOATS
                or dtype_b not in FLOATS
                or len(shape) != 2
                or len(shape_b) != 2
                or not shape[0] == rank == shape_b[1]
                or not shape[1]
                or not shape_b[0]
            ):
                return False
            how[stem + "weight"] = key, key_b, scaling, "linear", 0, False
        return len(self.tensors.tensors) % 2 == 0

    def _sort_rest(self, rest: list[str]) -> None:
        """Sort unusual modules and extras; note halves without the other, and foreign tensors."""
        parts: dict[str, dict[str, str]] = {"a": {}, "b": {}, "embedding_a": {}, "embedding_b": {}}
        others: list[tuple[str, str]] = []
        for key in rest:
            if not key.startswith(PREFIX):
                refuse(key, self.tensors, self.problems)
                continue
            part, module = split(key[17:])
            if part in parts:
                parts[part][module] = key
            else:
                others.append((key, part))
        self._pair(parts["a"], parts["b"], ("lora_A", "lora_B"), embedding=False)
        self._pair(parts["embedding_a"], parts["embedding_b"], ("lora_embedding_A", "lora_embedding_B"), embedding=True)
        left_out = self._left_out([key for key, _ in others])
        for key, part in others:
            if key not in left_out and not is_of_training(key):
                self.extras.take(key, part)

    def _left_out(self, keys: list[str]) -> set[str]:
        """The keys of the base's own tensors, which are not part of the adapter."""
        left_out = frozen(keys, {split(one[0][17:])[1] for one in self.how.values()}, self.config)
        if left_out:
            self.notes = (f"{len(left_out)} tensors of the base itself are left out, such as {left_out[0][17:]}",)
        return set(left_out)

    def build(self, weight: str, how: tuple[str, str, float, Kind, int, bool]) -> LoraDelta:
        key_a, key_b, scaling, kind, rank, over = how
        a, b = self.tensors.factor(key_a, self.allow), self.tensors.factor(key_b, self.allow)
        if rank:
            a, b = _experts(a, b, rank)
        if kind == "linear" and self.config.blocks:
            a = block_diagonal(a, a.shape[1] * self.config.blocks.times(weight.removesuffix(".weight"))[0])
        if kind in ("linear", "conv") and b.shape[1] < a.shape[0]:
            b = block_diagonal(b, a.shape[0])  # a convolution in groups too
        delta = LoraDelta(a, b, scaling, kind)
        return delta.over(kind) if over else delta

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
            empty = [key for key, shape in ((key_a, shape_a), (key_b, shape_b)) if 0 in shape]
            for key in empty:
                refuse_empty(key, self.tensors, self.problems)
            if empty:
                continue
            for key, dtype in ((key_a, dtype_a), (key_b, dtype_b)):
                if dtype not in FLOATS:
                    self.problems.add(f"{where}: tensor {key} is {dtype}, expected a float type")
            kind: Kind = "embedding" if embedding else "linear" if len(shape_a) == 2 else "conv"
            weight = module + ".weight"
            parameter = self.parameters.of(module, a)
            # PEFT looks a parameter up by its own name, in the patterns too.
            rank, scaling = self.config.rank_of(parameter or module), self.config.scaling_of(parameter or module)
            experts, over = 0, False
            times_a, times_b = self._blocks(module, kind, parameter, shape_a, shape_b)
            if shape_a[0] % times_a == 0 and shape_b[0] % times_b == 0:
                shape_a, shape_b = _wider(shape_a, times_a), _wider(shape_b, times_b)
            if parameter:
                weight, square = parameter, shape_a[-1:] == shape_b[:1]
                kind, over = self.parameters.kind(shape_a[0] if shape_a else 0, rank, square)
                experts = rank if shape_a and shape_a[0] != rank else 0
            self._check_shapes(module, shape_a, shape_b, rank, kind, experts)
            if weight in self.how:
                self.problems.add(f"{where}: weight {weight} has two updates, by {self.how[weight][0]} and {key_a}")
            self.how[weight] = (key_a, key_b, scaling, kind, experts, over)

    def _blocks(self, module: str, kind: Kind, parameter: str | None, a: Shape, b: Shape) -> tuple[int, int]:
        """How many blocks of a diagonal lora_A and lora_B are stored as; 1 for what is whole."""
        if kind == "conv" and len(b) == len(a) and 0 < b[1] < a[0] and a[0] % b[1] == 0:
            return 1, a[0] // b[1]  # of a convolution in groups
        if kind == "linear" and len(a) == len(b) == 2 and self.config.blocks and not parameter:
            return self.config.blocks.times(module)
        return 1, 1

    def _check_shapes(self, module: str, a: Shape, b: Shape, rank: int, kind: Kind, experts: int) -> None:
        where = self.tensors.path
        if experts:
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


def _wider(shape: Shape, times: int) -> Shape:
    return (shape[0], shape[1] * times, *shape[2:]) if times > 1 else shape


def _experts(a: Factor, b: Factor, rank: int) -> tuple[Factor, Factor]:
    """PEFT's two-dimensional storage as ``(E, rank, in)`` and ``(E, out, rank)``: in lora_B the expert runs fastest."""
    experts = a.shape[0] // rank
    out = b.shape[0]

    def split_a(array: np.ndarray) -> np.ndarray:
        return array.reshape(experts, rank, -1)

    def split_b(array: np.ndarray) -> np.ndarray:
        return array.reshape(out, rank, experts).transpose(2, 0, 1)

    return a.mapped(split_a, (experts, rank, a.shape[1])), b.mapped(split_b, (experts, out, rank))
