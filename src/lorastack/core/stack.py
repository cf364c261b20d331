"""LoraStack: adapters applied additively, ``output += scale_0 * LoRA_0(x) + scale_1 * LoRA_1(x) + ...``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.delta import compute_dtype, finite
from lorastack.core.entry import Entry, Now, pack_of
from lorastack.core.given import Given, pairs_of
from lorastack.core.notebook import LORA_FIELDS, html_table, lora_row
from lorastack.core.packed import PackedWeight, Term
from lorastack.core.target import Naming, TargetModule
from lorastack.errors import ArgumentError, NamingError, UnknownNameError, did_you_mean
from lorastack.ways import CONVERT, ways

if TYPE_CHECKING:
    from lorastack.base import BaseModel

#: Weight names whose sum is kept, those without any sum included.
_MOST_PACKS = 1 << 10
_UNKNOWN: Any = object()
_KIND_NAMES = {
    "gguf": "GGUF tensor names",
    "hf": "Hugging Face names",
    "kohya": "kohya names",
    "own": "names of its own",
}


class LoraStack:
    """Adapters with scales, applied as one sum.

    Two lists: `push` takes a `LoadedLora` with a scale, found by weight name; `push_adapter` takes any
    object that satisfies `LoraAdapter`, found by (target module, layer). The stack is the only object
    here that changes; several threads may read it while one changes it, and each sees the stack as it was at one time.
    ``copy.copy`` copies the lists and shares the weights; a pickle has the numbers with it.

    Parameters
    ----------
    entries
        Adapters, each alone (scale 1) or as ``(adapter, scale)``; or a mapping of adapter to scale, or of a name to
        either. A stack, of which this becomes a copy of the first list.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    >>> lora = LoadedLora.from_tensors({"layer.weight": (a, b)}, name="ones")
    >>> stack = LoraStack([(lora, 0.5), (lora, 0.25)])
    >>> stack.names
    ('ones', 'ones#2')
    >>> stack.apply("layer.weight", np.array([1, 2, 3], np.float32), out_features=2)
    array([4.5, 4.5], dtype=float32)
    >>> LoraStack([lora]) + lora, LoraStack({"mine": (lora, 2)})["mine"][1], [scale for _, scale in stack]
    (LoraStack([ones:1, ones#2:1]), 2.0, [0.5, 0.25])
    """

    def __init__(self, entries: Given = ()) -> None:
        self._adapters: list[LoraAdapter] = []
        self._now = Now((), {})
        for lora, scale in pairs_of(entries):
            self.push(lora, scale)

    def push(self, lora: LoadedLora, scale: float = 1.0) -> None:
        """Put ``lora`` on top; ``scale`` multiplies the adapter's own scaling.

        Raises
        ------
        NamingError
            When its names are of another kind than those on the stack.
        ArgumentError
            When it is no `LoadedLora`, or the scale is not a finite number.
        """
        if not isinstance(lora, LoadedLora):
            raise ArgumentError(
                f"push() takes a LoadedLora, got {type(lora).__name__}; load a file with lorastack.load(path), "
                "or use push_adapter() for an object with rank, alpha, target_modules and delta()"
            )
        if self._entries and lora.naming != self.naming:
            there = self._entries[0]
            raise NamingError(
                f"{lora.name} has {_KIND_NAMES[lora.naming]}, {there.name} on this stack has "
                f"{_KIND_NAMES[there.lora.naming]}; one stack holds one kind{ways(CONVERT)}"
            )
        self._set([*self._entries, Entry(self._free_name(lora.name), lora, finite(scale, "a scale"))])

    def push_adapter(self, adapter: LoraAdapter) -> None:
        """Put any object that satisfies the `LoraAdapter` protocol on the second list."""
        missing = [n for n in ("rank", "alpha", "target_modules", "delta") if not hasattr(adapter, n)]
        if missing:
            raise ArgumentError(f"{type(adapter).__name__} is no LoraAdapter: it lacks {', '.join(missing)}")
        self._adapters.append(adapter)

    def pop(self) -> tuple[LoadedLora, float] | None:
        """Remove and return the last ``(lora, scale)``; None when there is none."""
        if not self._entries:
            return None
        *rest, entry = self._entries
        self._set(rest)
        return entry.lora, entry.scale

    def remove(self, name: str) -> tuple[LoadedLora, float]:
        """Take out the entry of that adapter name and return it.

        Raises
        ------
        UnknownNameError
            A `LookupError` that lists the names there are.
        """
        entries = list(self._entries)
        entry = entries.pop(self._position(name))
        self._set(entries)
        return entry.lora, entry.scale

    def set_scale(self, name: str, scale: float) -> None:
        """Give the entry of that adapter name another scale."""
        entries = list(self._entries)
        position = self._position(name)
        entries[position] = entries[position]._replace(scale=finite(scale, "a scale"))
        self._set(entries)

    def clear(self) -> None:
        """Remove everything, both lists."""
        self._set([])
        self._adapters.clear()

    @property
    def entries(self) -> tuple[tuple[LoadedLora, float], ...]:
        """``(lora, scale)`` of every entry, in the order pushed."""
        return tuple((entry.lora, entry.scale) for entry in self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The entries' names, each once: a second ``zara`` is ``zara#2``."""
        return tuple(entry.name for entry in self._entries)

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """What `push_adapter` put here, in order."""
        return tuple(self._adapters)

    @property
    def naming(self) -> Naming | None:
        """Whose weight names the entries have; None without entries."""
        return self._entries[0].lora.naming if self._entries else None

    @property
    def weights(self) -> tuple[str, ...]:
        """Every weight that some entry changes, in the order first seen."""
        return tuple(dict.fromkeys(name for entry in self._entries for name in entry.lora.adapters))

    def is_empty(self) -> bool:
        """True when both lists are empty."""
        return not self._entries and not self._adapters

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return not self.is_empty()

    def __iter__(self) -> Iterator[tuple[LoadedLora, float]]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @overload
    def __getitem__(self, at: int | str) -> tuple[LoadedLora, float]: ...
    @overload
    def __getitem__(self, at: slice) -> LoraStack: ...
    def __getitem__(self, at: int | str | slice) -> tuple[LoadedLora, float] | LoraStack:
        """``(lora, scale)`` by position or by name; a slice is a stack of those."""
        if isinstance(at, slice):
            return LoraStack(self.entries[at])
        return self.entries[self._position(at) if isinstance(at, str) else at]

    def __add__(self, other: Any) -> LoraStack:
        """This stack, with the adapters of another stack, or one adapter, on top."""
        if isinstance(other, LoadedLora):
            other = LoraStack([other])
        if not isinstance(other, LoraStack):
            return NotImplemented
        both = LoraStack([*self.entries, *other.entries])
        both._adapters = [*self._adapters, *other._adapters]
        return both

    def __radd__(self, other: Any) -> LoraStack:
        # What sum() begins with.
        return LoraStack() + self if isinstance(other, int) and other == 0 else NotImplemented

    def __copy__(self) -> LoraStack:
        twin = LoraStack()
        twin._adapters = list(self._adapters)
        twin._now = Now(self._entries, dict(self._packs))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_adapters": self._adapters, "_now": Now(self._entries, {})}

    def __repr__(self) -> str:
        entries = ", ".join(f"{entry.name}:{entry.scale:g}" for entry in self._entries)
        more = f" + {len(self._adapters)} by target and layer" if self._adapters else ""
        return f"LoraStack([{entries}]{more})"

    def _repr_html_(self) -> str:
        rows = [(f"{entry.scale:g}", *lora_row(entry.lora, entry.name)) for entry in self._entries]
        return html_table(repr(self).partition("(")[0], ("scale", *LORA_FIELDS), rows)

    def save(self, path: str | Path, *, base: BaseModel | str | Path | None = None, **options: Any) -> Path:
        """Bake the stack exactly and write it to a ``.gguf`` file or a PEFT folder; options as of `lorastack.save`."""
        return self.bake(base).save(path, **options)

    def terms(self, name: str) -> Iterator[Term]:
        """``(scale, delta)`` of the entries that have the weight ``name``, in the order pushed.

        The delta holds its own scaling. Everything built on a stack consumes these.
        """
        for entry in self._entries:
            delta = entry.lora.get(name)
            if delta is not None:
                yield entry.scale, delta

    def apply(self, tensor_name: str, x: np.ndarray, out_features: int) -> np.ndarray:
        """``sum of scale_i * scaling_i * B_i @ A_i @ x`` over the entries; the caller adds it to the base's output.

        Parameters
        ----------
        tensor_name
            The weight, by the name the adapters know it by. Adapters without it are skipped.
        x
            ``[in]`` or ``[..., in]``, any float dtype; integer ids for an embedding.
        out_features
            Length of the output, for the zeros when no adapter has that weight, and as a check.

        Returns
        -------
        numpy.ndarray
            ``[..., out_features]``, float32, or float64 for float64 input.

        Raises
        ------
        ShapeError
            When an adapter with that weight does not fit x or ``out_features``.
        UnsupportedError
            When an adapter changes that weight in more ways than a low-rank update (DoRA, a bias, ...).
        NonFiniteError
            When a factor holds NaN or Inf, listing each.
        """
        if type(x) is not np.ndarray:
            x = np.asarray(x)
        entries, packs = self._now
        pack = packs.get(tensor_name, _UNKNOWN)
        if pack is _UNKNOWN:
            pack = pack_of(tensor_name, entries, compute_dtype(x).type)
            # A name that no adapter has may be any, of any number: not all of them are kept.
            if pack is not None or len(packs) < _MOST_PACKS:
                packs[tensor_name] = pack
        if pack is None:
            lead = x.shape if x.dtype.kind in "iu" else x.shape[:-1]
            return np.zeros((*lead, out_features), compute_dtype(x))
        return pack.apply(x, out_features)

    def applied_delta(self, target: TargetModule | str, layer: int, x: np.ndarray) -> np.ndarray | None:
        """``sum of (alpha_i / rank_i) * delta_i(x)`` over the adapters of the second list.

        None when no adapter covers (target, layer). Shapes and dtypes as in `apply`.
        """
        target = TargetModule.of(target)
        total: np.ndarray | None = None
        for adapter in self._adapters:
            delta = adapter.delta(target, layer)
            if delta is None:
                continue
            part = delta.apply(x, adapter.alpha / adapter.rank)
            total = part if total is None else total + part
        return total

    def bake(
        self,
        base: BaseModel | str | Path | None = None,
        name: str | None = None,
        *,
        method: str = "cat",
        rank: int | Sequence[int] | None = None,
        energy: float | None = None,
        tolerance: float | None = None,
        density: float | None = None,
        seed: int = 0,
        allow_mixed_bases: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> LoadedLora:
        """The whole stack as one adapter. Without further words: exactly, ranks side by side, nothing read yet.

        Any program that takes one LoRA adapter computes the stack's sum with it: the scalings of all
        weights are made one number. With ``rank``, ``energy`` or ``tolerance`` each weight becomes the best
        approximation of the sum (truncated SVD, through the factors alone); what was lost is in ``made`` of
        the result, exactly, and in the recipe of a file it is saved to.

        Parameters
        ----------
        base
            The base model: every adapter has to fit it. Needed when the second list is not empty, for its weight names.
        name
            The adapter's name; the names of the stack's adapters joined by ``+`` when not given.
        method
            ``cat``, ``linear`` (the same sum without dependent ranks), ``svd``, or a rule in a space:
            ``ties``, ``dare``, ``dare_ties`` or ``magnitude_prune``, then ``@dense``, ``@knots`` or ``@core``.
            See docs/combine.md for each.
        rank
            The rank of every weight at most (where it has no more, nothing is lost); of several the smallest that keeps
            ``energy`` (0.99 unless given) or ``tolerance``, weight by weight.
        energy
            The part of the squared norm to keep in each weight, such as 0.99.
        tolerance
            The relative error to stay within in each weight, in the Frobenius norm, such as 1e-3.
        density
            The part of entries that rules keep: 0.2 for trimming, 0.5 (1 - drop rate) for DARE unless given.
        seed
            Of DARE's masks.
        allow_mixed_bases
            Without a base: bake also what names different bases or shares no weight.
        progress
            Called with the steps done and the steps there are.

        Raises
        ------
        ArgumentError
            When the stack is empty, or an option has no meaning, such as a rank of 0.
        NamingError
            Listing the adapters when they are hardly for one base.
        UnsupportedError
            Listing every extra that an ordinary adapter's low-rank updates cannot hold.
        ShapeError
            Listing every weight that the adapters disagree on.
        NonFiniteError
            Listing every factor with NaN or Inf, where the method reads them.

        Examples
        --------
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> loras = [LoadedLora.from_tensors({"w": (rng.normal(size=(8, 30)), rng.normal(size=(40, 8)))}) for _ in "ab"]
        >>> baked = LoraStack([(loras[0], 0.7), (loras[1], 0.1)]).bake(rank=8)
        >>> baked.rank, round(baked.made["error"], 3)
        (8, 0.107)
        """
        from lorastack.algebra.bake import bake

        return bake(
            self,
            base,
            name,
            method=method,
            rank=rank,
            energy=energy,
            tolerance=tolerance,
            density=density,
            seed=seed,
            allow_mixed_bases=allow_mixed_bases,
            progress=progress,
        )

    def fingerprint(self, **how: Any) -> str:
        """64 digits that tell the adapters' content, their steps and scales, and ``how``: equal for equal bakes."""
        from lorastack.fingerprint import fingerprint

        return fingerprint(self, how)

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return self._now.entries

    @property
    def _packs(self) -> dict[str, PackedWeight | None]:
        return self._now.packs

    def _set(self, entries: Sequence[Entry]) -> None:
        """Put other entries here, with nothing packed: in one step, so that no reader packs old ones for them."""
        self._now = Now(tuple(entries), {})

    def _position(self, name: str) -> int:
        for position, entry in enumerate(self._entries):
            if entry.name == name:
                return position
        there = ", ".join(self.names) or "none"
        near = did_you_mean(name, self.names)
        raise UnknownNameError(f"no adapter named {name!r} on this stack; there are: {there}{near}")

    def _free_name(self, name: str) -> str:
        taken = set(self.names)
        if name not in taken:
            return name
        return next(f"{name}#{n}" for n in range(2, len(taken) + 3) if f"{name}#{n}" not in taken)
