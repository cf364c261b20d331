"""Modules: a file's tensors by the module and the part of its update that they are, in whatever spelling.

kohya, ComfyUI, diffusers and LyCORIS name a module's tensors ``<module>.<part>``; what a module is called, and what
its scaling is where the file has no alpha, is the reader's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from lorastack.core.delta import LoraDelta, misfit
from lorastack.core.dtypes import FLOAT32_MAX
from lorastack.errors import FormatError, Problems, shown
from lorastack.formats.lycoris import Expansion, UnreadError, expand
from lorastack.formats.safetensors_file import FLOATS, NUMBERS, Info
from lorastack.formats.tensors import Tensors

#: Ending of a key -> the part it is. The longest that fits counts.
PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "down.weight": "down",
    "up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "dora",
    "lora_magnitude_vector.weight": "dora",
    "lora_B.bias": "lora_bias",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{f"hada_{one}": f"hada_{one}" for one in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{one}": f"lokr_{one}" for one in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
#: Ending of a key -> what such an update is, which is no low-rank one.
REFUSED = {
    "on_input": "an IA3 update, which multiplies what a layer gives",
    "oft_blocks": "an OFT or BOFT update, which turns the weight",
    "oft_diag": "an OFT update, which turns the weight",
    "a1.weight": "a GLora update, which multiplies the weight",
    "a2.weight": "a GLora update, which multiplies the weight",
    "set_weight": "a weight in place of the base's, as ComfyUI saves it",
    "bias_indices": "a sparse bias of the first LyCORIS",
    "q_layer.weight": "a T-LoRA update",
}
_DOWNS = (".lora_down.weight", ".lora_A.weight")
#: Parts that are no factors of an update.
_BESIDE = ("dora", "dora_scale", "lora_bias", "diff", "diff_b")
#: How many update's parts a message names.
_NAMED = 200


class Pair(NamedTuple):
    """A plain update: the keys of its factors and of its alpha, its scaling where that is known, and its kind."""

    a: str
    b: str
    alpha: str | None
    scaling: float
    linear: bool


class Modules:
    """Sorts the tensors of a file into ``how`` (weight name -> how to build it), ``extras`` and ``notes``.

    Parameters
    ----------
    name_of
        Module, as the file spells it -> the weight's name.
    scaling_of
        (weight name, rank) -> its scaling where the file has no alpha for it; 1 when not given.
    """

    def __init__(
        self,
        tensors: Tensors,
        name_of: Callable[[str], str],
        allow_nonfinite: bool,
        problems: Problems,
        scaling_of: Callable[[str, int], float | None] | None = None,
    ) -> None:
        self.tensors, self.name_of, self.allow, self.problems = tensors, name_of, allow_nonfinite, problems
        self._scaling_of = scaling_of
        self.how: dict[str, str | Pair | Expansion] = {}
        self.extras: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._alpha_keys: list[str] = []
        #: Of a file of nothing but plain pairs, whose ``how`` are the modules' names in it.
        self._endings = "", ""
        if not self._all_plain():
            self._sort()
        if not self.how and not self.extras and not problems:
            problems.add(f"{tensors.path}: it has no low-rank factors, so it would change nothing")

    def build(self, name: str, how: str | Pair | Expansion) -> LoraDelta:
        """The update of one weight; its factors are not read.

        Raises
        ------
        FormatError
            Listing every alpha in the file that is no number with a meaning.
        """
        if isinstance(how, str):
            down, up = (how + ending for ending in self._endings)
            alpha = f"{how}.alpha"
            how = Pair(down, up, alpha if alpha in self.tensors.tensors else None, 1.0, True)
        if isinstance(how, Expansion):
            return how.build(self._scaling(how.alpha, how.rank))
        scaling = how.scaling if how.alpha is None else self._scaling(how.alpha, self.tensors.tensors[how.a][1][0])
        a, b = self.tensors.factor(how.a, self.allow), self.tensors.factor(how.b, self.allow)
        return LoraDelta(a, b, scaling, "linear" if how.linear else "conv")

    @cached_property
    def alphas(self) -> Mapping[str, float]:
        """Key -> value of every alpha, read at once; a single number each."""
        problems = Problems(f"cannot load {self.tensors.path}")
        found: dict[str, float] = {}
        for key in self._alpha_keys:
            value = float(self.tensors.factor(key, True).raw().reshape(-1)[0])
            if not abs(value) <= FLOAT32_MAX:  # NaN too
                problems.add(f"{self.tensors.path}: tensor {key} is {value:g}, expected a finite number; save it again")
            found[key] = value
        problems.raise_any(FormatError)
        return found

    def _scaling(self, alpha: str | None, rank: int) -> float:
        """alpha/rank; no alpha, or 0, means the rank (sd-scripts, networks/lora.py)."""
        value = self.alphas[alpha] if alpha is not None else 0.0
        return value / rank if value else 1.0

    def _all_plain(self) -> bool:
        """Sort a file that is nothing but pairs of linear factors with their alphas; False if it is not.

        Most of opening a file is this loop, so what is checked is checked in place.
        """
        if self._scaling_of is not None:
            return False
        tensors, how, name_of = self.tensors.tensors, self.how, self.name_of
        nothing: Info = ("", (), 0, 0)
        down = next((end for end in _DOWNS for key in tensors if key.endswith(end)), None)
        if down is None:
            return False
        up = ".lora_up.weight" if down == _DOWNS[0] else ".lora_B.weight"
        cut, count = -len(down), 0
        for key in tensors:
            if not key.endswith(down):
                continue
            stem = key[:cut]
            dtype, shape, _, _ = tensors[key]
            dtype_b, shape_b, _, _ = tensors.get(stem + up, nothing)
            if (
                dtype not in FLOATS
                or dtype_b not in FLOATS
                or len(shape) != 2
                or len(shape_b) != 2
                or not shape[0] == shape_b[1] != 0
                or not shape[1]
                or not shape_b[0]
            ):
                break
            alpha = tensors.get(stem + ".alpha")
            if alpha is not None:
                if alpha[1] not in ((), (1,)) or alpha[0] not in NUMBERS:
                    break
                count += 1
            count += 2
            how[stem if "." not in stem else name_of(stem)] = stem
        self._endings = down, up
        if count == len(tensors) and 2 * len(how) + sum(map(_is_alpha, tensors)) == count:
            self._alpha_keys = list(filter(_is_alpha, tensors)) if count > 2 * len(how) else []
            return True
        how.clear()
        return False

    def _sort(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        refused = set()
        where = self.tensors.path
        for key in self.tensors.tensors:
            module, part = split(key)
            if why := REFUSED.get(part) or (part == "weight" and self._is_ia3(module) and REFUSED["on_input"]):
                refused.add(self.name_of(module))
                if not (part == "a2.weight" or part == "weight"):
                    self.problems.add(f"{where}: module {module} has {why}; it is not read")
            elif not part or not module:
                self.problems.add(f"{where}: tensor {key} is no part of an update known here")
            elif part in (at := modules.setdefault(self.name_of(module), {})):
                self.problems.add(f"{where}: tensors {at[part]} and {key} are both the {part} of one module")
            else:
                at[part] = key
        for name, parts in modules.items():
            if len(self.problems.lines) > _NAMED:
                self.problems.add("and so on")
                return
            if name not in refused:
                self._take(name, parts)
        made = [how for how in self.how.values() if isinstance(how, Expansion) and how.what]
        for what in dict.fromkeys(how.what for how in made):
            ranks = [how.made for how in made if how.what == what]
            grown = f"of rank up to {max(ranks)}, {max(how.rank for how in made if how.what == what)} in the file"
            self.notes.append(f"{len(ranks)} updates are {what}, used as plain ones {grown}")

    def _is_ia3(self, module: str) -> bool:
        return f"{module}.on_input" in self.tensors.tensors

    def _take(self, name: str, parts: dict[str, str]) -> None:
        """Sort one module, by the keys of its parts."""
        where, tensors = self.tensors.path, self.tensors.tensors
        before = len(self.problems.lines)
        alpha = parts.pop("alpha", None)
        if alpha is not None:
            dtype, shape, _, _ = tensors[alpha]
            if math.prod(shape) != 1 or dtype not in NUMBERS:
                self.problems.add(
                    f"{where}: tensor {alpha} is {dtype} of shape {shown(list(shape))}, expected one number"
                )
            self._alpha_keys.append(alpha)
        for key in parts.values():
            dtype, shape, _, _ = tensors[key]
            if dtype not in FLOATS:
                self.problems.add(f"{where}: tensor {key} is {dtype}, expected a float type")
            if 0 in shape:
                self.problems.add(f"{where}: tensor {key} is empty, a dimension is 0: {shown(list(shape))}")
        if len(self.problems.lines) > before:
            return
        extra = {
            part: parts.pop(part) for part in ("dora", "dora_scale", "lora_bias", "diff", "diff_b") if part in parts
        }
        if parts.keys() == {"down", "up"}:
            self._pair(name, parts, alpha)
        elif parts:
            self._expand(name, parts, alpha)
        elif not extra:
            self.problems.add(f"{where}: module {name} has an alpha and nothing else; save the adapter again")
        if len(self.problems.lines) == before:
            for part, key in extra.items():
                self._extra(name, part, key)

    def _pair(self, name: str, parts: dict[str, str], alpha: str | None) -> None:
        (_, a, _, _), (_, b, _, _) = (self.tensors.tensors[parts[part]] for part in ("down", "up"))
        linear = len(a) == 2
        if problem := misfit(a, b, "linear" if linear else "conv"):
            self.problems.add(f"{self.tensors.path}: module {name}: {problem}")
            return
        scaling = 1.0
        if self._scaling_of is not None and (said := self._scaling_of(name, a[0])) is not None:
            scaling = said
            if alpha is not None:
                self.problems.add(
                    f"{self.tensors.path}: module {name} has an alpha of its own, and lora_adapter_metadata says its "
                    "scaling too; which of the two counts is not known"
                )
        self.how[name] = Pair(parts["down"], parts["up"], alpha, scaling, linear)

    def _expand(self, name: str, parts: dict[str, str], alpha: str | None) -> None:
        factors = {part: self.tensors.factor(key, self.allow) for part, key in parts.items()}
        try:
            found = expand(factors, alpha)
            if isinstance(found, Expansion):
                self.how[name] = found
            else:
                self.extras.setdefault("lokr", {})[name] = found
        except UnreadError as error:
            self.problems.add(f"{self.tensors.path}: module {name}: {error}")

    def _extra(self, name: str, part: str, key: str) -> None:
        factor = self.tensors.factor(key, self.allow)
        if part == "diff":
            self.extras.setdefault("diff", {})[name] = factor
            return
        if part == "diff_b":
            self.extras.setdefault("diff_b", {})[bias_of(name)] = factor
            return
        where = self.tensors.path
        how = self.how.get(name)
        if how is None:
            why = "LoKr of two full factors with a DoRA magnitude" if name in self.extras.get("lokr", {}) else None
            self.problems.add(f"{where}: tensor {key}: " + (f"{why} is not read" if why else "it goes with no update"))
            return
        shape = factor.shape
        if not isinstance(how, Expansion):
            assert isinstance(how, Pair)
            a, b = (self.tensors.tensors[one][1] for one in (how.a, how.b))
            out, conv = b[0], None if how.linear else len(a)
        else:
            out, conv = how.out, how.dimensions if how.dimensions > 2 else None
        size = math.prod(shape)
        if part == "dora_scale" and len(shape) > 1 and shape[0] == 1 and size > 1:
            self.problems.add(
                f"{where}: tensor {key} is {list(shape)}: a magnitude for each column (as LyCORIS can train it), "
                "which is not read; only one for each row is"
            )
        elif size != out:
            self.problems.add(f"{where}: tensor {key} is {list(shape)}, its lora_up has {out} rows")
        else:
            kind = "lora_bias" if part == "lora_bias" else "dora"
            wanted = (1, out, *(1 for _ in range(conv - 2))) if conv and kind == "dora" else (out,)
            self.extras.setdefault(kind, {})[name] = factor.mapped(lambda x: x.reshape(wanted), wanted)


def _is_alpha(key: str) -> bool:
    return key.endswith(".alpha")


def split(key: str) -> tuple[str, str]:
    """(module, part) of a key; the part is empty where it is none known here.

    >>> split("lora_te_a_fc1.lora_down.weight"), split("unet.to_q.lora_A.weight"), split("a.b.c")
    (('lora_te_a_fc1', 'down'), ('unet.to_q', 'down'), ('a.b.c', ''))
    """
    words = key.rsplit(".", 3)
    for first in range(1, len(words)):
        ending = ".".join(words[first:])
        if part := PARTS.get(ending) or (ending if ending in REFUSED or ending == "weight" else None):
            return ".".join(words[:first]), part
    return key, ""


def bias_of(name: str) -> str:
    """The name of the bias beside a weight.

    >>> bias_of("a.b.weight"), bias_of("lora_unet_a")
    ('a.b.bias', 'lora_unet_a.bias')
    """
    return f"{name.removesuffix('.weight')}.bias"
