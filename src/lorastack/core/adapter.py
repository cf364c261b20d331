"""LoraAdapter, what any adapter must offer, and LoadedLora, an adapter with its weights by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lorastack.core.delta import Kind, LoraDelta, as_floats, finite, read_all
from lorastack.core.factor import Factor
from lorastack.core.lazy import LazyDeltas
from lorastack.core.notebook import LORA_FIELDS, html_table, lora_row
from lorastack.core.patterns import FirstMatch, Matcher, Pattern
from lorastack.core.target import Naming, TargetModule, is_front, naming_of, place_of, with_new_front
from lorastack.errors import ArgumentError, UnsupportedError, shown

if TYPE_CHECKING:
    import gguf

#: What an adapter holds that is not a low-rank update: kind -> name -> value (see docs/extras.md).
Extras = Mapping[str, Mapping[str, Any]]


class SourceFile(Protocol):
    """A file that an adapter was read from: ``path``, ``size``, and the hash of the bytes its numbers come from."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    def sha256(self) -> str: ...


@runtime_checkable
class LoraAdapter(Protocol):
    """Anything that gives updates by (target module, layer); its row order is Hugging Face's.

    ``alpha / rank`` multiplies every delta. An adapter may also have ``layers``, the layer numbers it
    covers; without it, it can be applied and attached, but not baked or merged.
    """

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def target_modules(self) -> tuple[TargetModule, ...]: ...
    def delta(self, target: TargetModule, layer: int) -> LoraDelta | None: ...


@dataclass(frozen=True, eq=False, repr=False)
class LoadedLora:
    """One adapter: its updates by weight name, and what else its file holds. Frozen, shared, never copied.

    Make one with `load`, `from_gguf` or `from_tensors`.

    Attributes
    ----------
    name
        The file's stem or the folder's name, or what ``name=`` said.
    adapters
        Weight name -> `LoraDelta`. The name is the base's own: a GGUF tensor name or a ``state_dict`` key.
    extras
        What is not low-rank (``dora``, ``lora_bias``, ``bias``, ``modules_to_save``, ``new_tokens``, ``norm``,
        ``base_weight``, ``alora``): kind -> name -> value.
    metadata
        What the file says of itself: GGUF keys, or the fields of adapter_config.json.
    naming
        Whose names they are: ``"gguf"``, ``"hf"``, ``"kohya"`` or ``"own"``.
    source
        Where it was loaded from; None for one made in memory.
    opened
        Every file that is read for it, as it was when opened; `files` has their paths.
    """

    name: str
    adapters: Mapping[str, LoraDelta]
    extras: Extras = field(default_factory=lambda: MappingProxyType({}))
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    naming: Naming = "own"
    source: Path | None = None
    file_alpha: float | None = None
    opened: tuple[SourceFile, ...] = ()
    #: What views changed since it was loaded, for the provenance of what is made of it.
    history: tuple[tuple[str, Any], ...] = ()
    #: The adapters a baked one was made of, with their scales.
    origin: tuple[tuple[LoadedLora, float], ...] = ()
    #: How it was baked where that is not the plain sum: method, settings, ranks and errors.
    made: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    #: Where names were converted since it was loaded: the kind and the metadata that its file has.
    as_loaded: tuple[Naming, Mapping[str, Any]] | None = None

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> LoadedLora:
        """Load an adapter of any format; see `lorastack.load`."""
        from lorastack.recipe import load

        return load(path, **options)

    @classmethod
    def from_gguf(cls, reader: gguf.GGUFReader, name: str | None = None, **options: Any) -> LoadedLora:
        """Take the adapter out of an open ``gguf.GGUFReader``.

        Raises
        ------
        FormatError
            Listing everything that is wrong with the file.
        """
        from lorastack.formats.gguf import from_reader

        return from_reader(reader, name=name, **options)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[np.ndarray, np.ndarray] | LoraDelta],
        alpha: float | None = None,
        name: str | None = None,
        naming: Naming | None = None,
        allow_nonfinite: bool = False,
    ) -> LoadedLora:
        """Make an adapter of arrays in memory.

        Parameters
        ----------
        tensors
            Weight name -> ``(a, b)``, with ``a [rank, in]`` and ``b [out, rank]``, or a `LoraDelta`.
        alpha
            The scaling of each weight is ``alpha / rank``, with the rank of that weight; 1 without alpha.
        naming
            Whose names these are; guessed from the names when not given.

        Examples
        --------
        >>> import numpy as np
        >>> lora = LoadedLora.from_tensors({"w": (np.ones((2, 3)), np.ones((4, 2)))}, alpha=4)
        >>> lora.get("w").scaling, lora.rank, lora.num_adapters()
        (2.0, 2, 1)
        """
        name = name or "lora"
        alpha = None if alpha is None else finite(alpha, "an alpha")
        deltas: dict[str, LoraDelta] = {}
        for weight, value in tensors.items():
            if isinstance(value, LoraDelta):
                deltas[weight] = value
                continue
            a, b = (
                Factor.of(as_floats(half, part), f"{name}: {weight}.{part}", allow_nonfinite)
                for half, part in zip(value, ("lora_A", "lora_B"), strict=True)
            )
            # GGUF has one embedding tensor of one name; its factors are kept as (rank, vocabulary) here.
            kind: Kind | None = "embedding" if weight == "token_embd.weight" else None
            delta = LoraDelta(a, b, kind=kind)
            deltas[weight] = delta if alpha is None else delta.scaled(alpha / delta.rank)
        return cls(
            name=name,
            adapters=MappingProxyType(deltas),
            naming=naming or naming_of(list(deltas)),
            file_alpha=alpha,
        )

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the adapter to a ``.gguf`` file or a PEFT folder; see `lorastack.save`."""
        from lorastack.formats import save

        return save(self, path, **options)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Upload the adapter with a model card to ``owner/name``; see `lorastack.pushing.push_to_hub`."""
        from lorastack.pushing import push_to_hub

        return push_to_hub(self, repo, **options)

    def get(self, name: str) -> LoraDelta | None:
        """The update of the weight ``name``; None when this adapter has none."""
        return self.adapters.get(name)

    def num_adapters(self) -> int:
        """How many weights this adapter changes."""
        return len(self.adapters)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read for it."""
        return tuple(file.path for file in self.opened)

    def check(self) -> None:
        """Read every factor now.

        Raises
        ------
        NonFiniteError
            Listing every factor that holds NaN or Inf.
        """
        read_all(list(self.adapters.values()))

    @cached_property
    def rank(self) -> int:
        """The largest rank of any weight."""
        return max((delta.rank for delta in self.adapters.values()), default=0)

    @property
    def alpha(self) -> float:
        """The file's alpha; the rank where the file has none or 0, which mean a scaling of 1."""
        return self.file_alpha or float(self.rank)

    @cached_property
    def places(self) -> Mapping[tuple[TargetModule, int], str]:
        """(target module, layer) -> weight name, for the view as a `LoraAdapter`.

        Raises
        ------
        UnsupportedError
            When a weight has no such place, or two have the same: that view would leave weights out.
        """
        places: dict[tuple[TargetModule, int], str] = {}
        lost: list[str] = []
        for name in self.adapters:
            place = place_of(name)
            if place is None:
                lost.append(f"{name} is no target module of a numbered layer")
            elif place in places:
                lost.append(f"{name} is the same place as {places[place]}: {place[0]} of layer {place[1]}")
            else:
                places[place] = name
        if lost:
            raise UnsupportedError(
                f"{self.name} cannot be used by (target module, layer); push it by weight name with push()",
                lost,
            )
        return places

    @cached_property
    def target_modules(self) -> tuple[TargetModule, ...]:
        """The target modules it changes, each once, in the file's order."""
        return tuple(dict.fromkeys(target for target, _ in self.places))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers it changes, ascending."""
        return tuple(sorted({layer for _, layer in self.places}))

    def delta(self, target: TargetModule | str, layer: int) -> LoraDelta | None:
        """The update at (target, layer), such that ``(alpha / rank) * delta`` is the true one.

        Each weight has a scaling of its own (rsLoRA, alpha patterns, ranks that differ), while a
        `LoraAdapter` has one alpha and one rank: the delta's scaling makes up the difference.
        """
        name = self.places.get((TargetModule.of(target), layer))
        return None if name is None else self.adapters[name].scaled(self.rank / self.alpha)

    def select(self, pattern: Pattern) -> LoadedLora:
        """A view of the weights whose name matches: a glob (``"blk.[0-9].*"``), a compiled regex, or ``"re:..."``.

        Extras named after a weight go with it.

        Raises
        ------
        ArgumentError
            When the pattern matches no weight.
        """
        matches = Matcher(pattern)
        kept = [name for name in self.adapters if matches(name)]
        if not kept:
            raise self._matches_nothing(_pattern_text(pattern))
        modules = {name.removesuffix(".weight") for name in kept}
        extras = {
            kind: MappingProxyType(inside)
            for kind, values in self.extras.items()
            if (
                inside := {
                    name: value
                    for name, value in values.items()
                    if kind == "alora" or matches(name) or name.rpartition(".")[0] in modules
                }
            )
        }
        return replace(
            self,
            adapters=LazyDeltas(dict.fromkeys(kept), lambda name, _: self.adapters[name]),
            extras=MappingProxyType(extras),
            history=(*self.history, ("select", _pattern_text(pattern))),
        )

    def without_extras(self, *kinds: str) -> LoadedLora:
        """A view without the extras of these kinds (of any kind, when none is named), by the caller's own will."""
        kept = {kind: values for kind, values in self.extras.items() if kinds and kind not in kinds}
        dropped = sorted(set(self.extras) - set(kept))
        return replace(self, extras=MappingProxyType(kept), history=(*self.history, ("without_extras", dropped)))

    def scaled(self, factors: float | Mapping[Pattern, float]) -> LoadedLora:
        """A view with the scaling of some weights multiplied: ``{pattern: factor}``, the first match counts.

        Raises
        ------
        ArgumentError
            When a pattern matches no weight.
        """
        table = {"*": factors} if isinstance(factors, (int, float)) else dict(factors)
        patterns = FirstMatch(table)
        if dead := patterns.without_hit(self.adapters):
            raise self._matches_nothing(dead)
        by_number: dict[int | None, float] = dict(enumerate(table.values()))
        found = {name: by_number.get(patterns.first(name), 1.0) for name in self.adapters}
        said = {_pattern_text(p): finite(f, "a factor") for p, f in table.items()}
        return replace(
            self,
            adapters=LazyDeltas(found, lambda name, f: self.adapters[name].scaled(f)),
            history=(*self.history, ("scaled", said)),
        )

    def with_weights_renamed(self, rename: Mapping[str, str]) -> LoadedLora:
        """A view with the front of its weights' names replaced, by whole parts: ``{old: new}``, the first match counts.

        For an adapter whose base has another name for the module that holds its weights, such as a text adapter in the
        text part of a model with pictures: ``{"model": "model.language_model"}``. Extras go along.

        Raises
        ------
        ArgumentError
            When ``old`` is the front of no weight, or two weights get one name.
        """
        names = {name: with_new_front(name, rename) for name in self.adapters}
        every = [*names, *(name for kind, values in self.extras.items() if kind != "alora" for name in values)]
        dead = [old for old in rename if not any(is_front(old, name) for name in every)]
        if dead or len(set(names.values())) < len(names):
            why = f"no weight's name begins with {dead}" if dead else f"{dict(rename)} gives two weights one name"
            raise ArgumentError(f"{self.name}: {why}; its weights are named like {', '.join(every[:3])}")
        old_names = {new: old for old, new in names.items()}
        extras = {
            kind: MappingProxyType({n if kind == "alora" else with_new_front(n, rename): v for n, v in values.items()})
            for kind, values in self.extras.items()
        }
        return replace(
            self,
            adapters=LazyDeltas(old_names, lambda _, old: self.adapters[old]),
            extras=MappingProxyType(extras),
            history=(*self.history, ("rename", dict(rename))),
        )

    def has_front(self, old: str) -> bool:
        """Whether the name of a weight, or of an extra, begins with these whole parts."""
        return any(is_front(old, name) for values in (self.adapters, *self.extras.values()) for name in values)

    def renamed(self, name: str) -> LoadedLora:
        """The same adapter under another name."""
        return replace(self, name=name)

    def _matches_nothing(self, pattern: object) -> ArgumentError:
        first = ", ".join(list(self.adapters)[:3])
        return ArgumentError(f"{self.name}: no weight matches {shown(pattern)}; its weights are named like {first}")

    def __add__(self, other: Any) -> Any:
        """Both at scale 1, as a stack; ``lora + lora`` counts twice."""
        from lorastack.core.stack import LoraStack

        return LoraStack([self]) + other

    def __getstate__(self) -> dict[str, Any]:
        """Its fields with the numbers of every factor: where it is unpickled there may be no such file."""
        extras = {kind: dict(values) for kind, values in self.extras.items()}
        plain = {name: dict(getattr(self, name)) for name in ("adapters", "metadata", "made")}
        return {one.name: getattr(self, one.name) for one in fields(self)} | plain | {"extras": extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extras = MappingProxyType({kind: MappingProxyType(values) for kind, values in state["extras"].items()})
        frozen = {name: MappingProxyType(state[name]) for name in ("adapters", "metadata", "made")}
        self.__dict__.update(state | frozen | {"extras": extras})

    def __copy__(self) -> LoadedLora:
        return self

    def __deepcopy__(self, memo: object) -> LoadedLora:
        return self

    def __repr__(self) -> str:
        extras = f", extras={sorted(self.extras)}" if self.extras else ""
        size = f"{self.num_adapters()} weights, rank={self.rank}"
        return f"LoadedLora({self.name!r}, {size}, naming={self.naming!r}{extras})"

    def _repr_html_(self) -> str:
        return html_table(f"LoadedLora {self.name}", LORA_FIELDS, [lora_row(self)])


def _pattern_text(pattern: Pattern) -> str:
    """The pattern as text that `Matcher` takes for the same, for recipes."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter in "aimsx" if pattern.flags & getattr(re, letter.upper()))
    return "re:" + (f"(?{flags})" if flags else "") + pattern.pattern
