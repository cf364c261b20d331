"""Handle: an attached stack - hot scales, push and pop, mixtures by row, detach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, LoraStackError, Problems, UnknownNameError, UnsupportedError
from lorastack.torch.experts import LiveParameter
from lorastack.torch.layer import LiveLayer
from lorastack.torch.places import Places
from lorastack.torch.prepare import Candidate, prepare
from lorastack.torch.prepared import Prepared
from lorastack.torch.rows import Mixture
from lorastack.torch.saved import Patch
from lorastack.torch.scales import Scales

#: Models that have a stack, so that none gets a second one by mistake.
ATTACHED: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()

Live = LiveLayer | LiveParameter


@dataclass
class Report:
    """What attaching found: adapter -> the weights it changes, and those left out under ``allow_partial``."""

    matched: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    nbytes: int = 0

    def __str__(self) -> str:
        lines = [f"{name}: {len(weights)} weights attached" for name, weights in self.matched.items()]
        lines += [f"{name}: left out: {line}" for name, rest in self.missing.items() for line in rest]
        return "\n".join([*lines, f"{self.nbytes / 2**20:.1f} MiB of factors"])


class Handle:
    """An attached stack; made by `attach`. Also a context manager that detaches at its end.

    The handle has its own copy of the stack and is the only way to change what is attached.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, allow_partial: bool) -> None:
        self.model = model
        self._dtype = dtype
        self._allow_partial = allow_partial
        self._places = Places(model)
        self._layers: dict[str, Live] = {}
        self._patches: list[list[Patch]] = []
        self._candidates: list[Candidate] = []
        self._scales = Scales()
        self.report = Report()
        self.attached = True

    # What is attached

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order; those of the stack's second list are ``adapter0``, ``adapter1``, ..."""
        return tuple(candidate.name for candidate in self._candidates)

    @property
    def scales(self) -> dict[str, float]:
        """Adapter name -> its present scale."""
        return {candidate.name: candidate.scale for candidate in self._candidates}

    @property
    def stack(self) -> LoraStack:
        """A copy of the stack as attached, under the model's own weight names."""
        stack = LoraStack()
        for candidate in self._candidates:
            if isinstance(candidate.adapter, LoadedLora):
                stack.push(candidate.adapter, candidate.scale)
            else:
                stack.push_adapter(candidate.adapter)
        return stack

    def __repr__(self) -> str:
        what = ", ".join(f"{name}:{scale:g}" for name, scale in self.scales.items())
        return f"Handle({type(self.model).__name__}, [{what}]{'' if self.attached else ', detached'})"

    # Changes

    def set_scale(self, name: str, scale: float) -> None:
        """Give an adapter another scale, from the next forward pass on: microseconds, nothing is compiled again."""
        self.set_scales({name: scale})

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give several adapters other scales at once.

        Raises
        ------
        UnknownNameError
            Listing the names there are; nothing is changed then.
        """
        positions = {name: self._position(name) for name in scales}
        for name, scale in scales.items():
            _check_scale(scale)
            self._candidates[positions[name]].scale = float(scale)
        self._rescale()

    def push(self, adapter: LoadedLora | LoraAdapter, scale: float = 1.0) -> str:
        """Attach one more adapter on top; returns its name here.

        Raises
        ------
        LoraStackError
            Listing everything that does not fit; nothing is changed then.
        """
        self._check_attached()
        _check_scale(scale)
        self.add_all([(adapter, scale)])
        return self.names[-1]

    def pop(self) -> tuple[LoadedLora | LoraAdapter, float] | None:
        """Take the last adapter off and return it with its scale; None when there is none."""
        self._check_attached()
        if not self._candidates:
            return None
        last = self._candidates[-1]
        self._remove(len(self._candidates) - 1)
        return last.adapter, last.scale

    def remove(self, name: str) -> tuple[LoadedLora | LoraAdapter, float]:
        """Take the adapter of that name off and return it with its scale."""
        self._check_attached()
        position = self._position(name)
        candidate = self._candidates[position]
        self._remove(position)
        return candidate.adapter, candidate.scale

    def replace(self, name: str, adapter: LoadedLora | LoraAdapter, scale: float | None = None) -> str:
        """Put another adapter in place of one, at its scale unless given; the new one comes on top."""
        self._check_attached()
        position = self._position(name)
        old = self._candidates[position]
        scale = old.scale if scale is None else scale
        self._prepare([(adapter, scale)], without=position)  # fails before anything is changed
        self._remove(position)
        return self.push(adapter, scale)

    def add_all(self, adapters: Sequence[tuple[LoadedLora | LoraAdapter, float]]) -> None:
        """Attach several adapters; either all of them or, when something does not fit, none."""
        candidates, prepared, patches = self._prepare(adapters)
        first = len(self._candidates)
        new: list[Live] = []
        for entry, parts in enumerate(prepared, first):
            for part in parts:
                layer = self._layers.get(part.place.name)
                if layer is None:
                    layer = self._layers[part.place.name] = _layer_for(part, self._dtype)
                    new.append(layer)
                layer.add(entry, part)
        self._candidates += candidates
        self._patches += patches
        self._settle()
        for layer in new:
            layer.attach()
        for patch in [patch for group in patches for patch in group]:
            patch.attach()
        self._rescale()

    def _prepare(
        self, adapters: Sequence[tuple[LoadedLora | LoraAdapter, float]], without: int | None = None
    ) -> tuple[list[Candidate], list[list[Prepared]], list[list[Patch]]]:
        """Everything made ready, nothing changed; one error lists all that does not fit."""
        staying = [n for n in range(len(self._candidates)) if n != without]
        taken = {patch.claim: self.names[n] for n in staying for patch in self._patches[n]}
        names = [self.names[n] for n in staying]
        problems = Problems(f"the stack does not fit {type(self.model).__name__}")
        candidates, prepared, patches = [], [], []
        left_out: dict[str, list[str]] = {}
        for adapter, scale in adapters:
            candidate = Candidate.of(adapter, float(scale), names)
            try:
                parts, own, missing = prepare(candidate, self._places, self._dtype, self._allow_partial)
            except LoraStackError as error:
                for line in error.problems or [str(error)]:
                    problems.add(f"{candidate.name}: {line}")
                continue
            for patch in own:
                if patch.claim in taken:
                    problems.add(
                        f"{candidate.name} and {taken[patch.claim]} both replace {patch.claim}; attach only one"
                    )
                taken.setdefault(patch.claim, candidate.name)
            names.append(candidate.name)
            candidates.append(candidate)
            prepared.append(parts)
            patches.append(own)
            left_out |= {candidate.name: missing} if missing else {}
        problems.raise_any(UnsupportedError)
        self.report.missing |= left_out
        return candidates, prepared, patches

    def _remove(self, position: int) -> None:
        for patch in self._patches.pop(position):
            patch.detach()
        self._candidates.pop(position)
        for name, layer in list(self._layers.items()):
            layer.remove(position)
            if not layer.slots:
                layer.detach()
                del self._layers[name]
        self._settle()
        self._rescale()

    def _settle(self) -> None:
        self._scales.lay_out(list(self._layers.values()), [c.scale for c in self._candidates])
        self.report.matched = {
            c.name: [name for name, layer in self._layers.items() if any(s.entry == n for s in layer.slots)]
            for n, c in enumerate(self._candidates)
        }
        self.report.nbytes = sum(layer.nbytes for layer in self._layers.values())

    def _rescale(self) -> None:
        self._scales.write([c.scale for c in self._candidates])
        for candidate, patches in zip(self._candidates, self._patches, strict=True):
            for patch in patches:
                if patch.on != (candidate.scale != 0):
                    patch.on = candidate.scale != 0
        for layer in self._layers.values():
            if layer.needs_refresh:
                layer.refresh()

    # Rows

    @contextlib.contextmanager
    def rows(
        self,
        mixtures: Sequence[Mapping[str, float]],
        *,
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        index: Sequence[int] | torch.Tensor | None = None,
    ) -> Iterator[Handle]:
        """Inside this context row i of the batch has the adapters and scales of ``mixtures[i]``, and no others.

        A row's scales take the place of the stack's; an adapter it does not name is off for it.

        Parameters
        ----------
        mixtures
            One mapping of adapter name to scale for each row of the batch.
        cu_seqlens
            For packed input: where each row begins, and the end, ``[rows + 1]``, as flash attention takes it.
        index
            For packed input: the row of every token, ``[tokens]``.

        Raises
        ------
        UnknownNameError
            Listing every name that is not attached.
        UnsupportedError
            Listing every adapter with DoRA, biases, saved modules, new tokens or experts, which have no row.
        """
        self._check_attached()
        table = self._table(mixtures)
        mixture = Mixture(table, _token_rows(cu_seqlens, index, len(mixtures)))
        layers = [layer for layer in self._layers.values() if isinstance(layer, LiveLayer)]
        before = [layer.mixture for layer in layers]
        for layer in layers:
            layer.mixture, layer.mixed = mixture, None
        try:
            yield self
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.mixture, layer.mixed = old, None

    def _table(self, mixtures: Sequence[Mapping[str, float]]) -> torch.Tensor:
        if not mixtures:
            raise ArgumentError("rows() needs a mixture for each row of the batch; an empty one, {}, is the base")
        unknown = sorted({name for mixture in mixtures for name in mixture if name not in self.scales})
        if unknown:
            raise UnknownNameError(f"no adapter is named {', '.join(unknown)}; attached are {', '.join(self.names)}")
        for scale in [scale for mixture in mixtures for scale in mixture.values()]:
            _check_scale(scale)
        problems = Problems("these adapters cannot be mixed by row")
        for n, candidate in enumerate(self._candidates):
            for why in self._without_rows(n):
                problems.add(f"{candidate.name}: {why}; remove it from the handle first")
        problems.raise_any(UnsupportedError)
        rows = [[mixture.get(name, 0.0) for name in self.names] for mixture in mixtures]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(mixtures), len(self.names))

    def _without_rows(self, entry: int) -> list[str]:
        """What of an adapter acts on the whole batch at once."""
        slots = [(layer, slot) for layer in self._layers.values() for slot in layer.slots if slot.entry == entry]
        found = []
        if any(slot.dora is not None for _, slot in slots):
            found.append("it has DoRA magnitudes")
        if any(slot.bias is not None for _, slot in slots):
            found.append("it has lora_B biases")
        if any(isinstance(layer, LiveParameter) for layer, _ in slots):
            found.append("it changes experts or bare parameters, whose tokens are no longer in rows")
        if any(not slot.finite and layer.kind in ("embedding", "conv") for layer, slot in slots):
            found.append("it has NaN or Inf in an embedding or a convolution, which rows cannot be kept apart from")
        found += sorted({f"it has {patch.what}" for patch in self._patches[entry]})
        return found

    # The end

    def detach(self) -> None:
        """Take everything off; the model is then what it was before, to the bit. A second call does nothing."""
        if not self.attached:
            return
        for layer in self._layers.values():
            layer.detach()
        for patch in [patch for group in reversed(self._patches) for patch in group]:
            patch.detach()
        self._layers, self.attached = {}, False
        ATTACHED.pop(self.model, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def _position(self, name: str) -> int:
        self._check_attached()
        for position, candidate in enumerate(self._candidates):
            if candidate.name == name:
                return position
        raise UnknownNameError(f"no adapter is named {name!r}; attached are {', '.join(self.names) or 'none'}")

    def _check_attached(self) -> None:
        if not self.attached:
            raise ArgumentError("this handle is detached; attach the stack again")


def _layer_for(part: Prepared, dtype: torch.dtype | None) -> Live:
    dtype = dtype or part.place.dtype
    return LiveParameter(part.place, dtype) if part.place.kind == "parameter" else LiveLayer(part.place, dtype)


def _check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or scale != scale or scale in (float("inf"), float("-inf")):
        raise ArgumentError(f"a scale is a finite number, got {scale!r}")


def _token_rows(cu_seqlens: Any, index: Any, rows: int) -> torch.Tensor | None:
    """The row of every token of a packed batch; None for an ordinary one."""
    if cu_seqlens is not None and index is not None:
        raise ArgumentError("give cu_seqlens or index, not both")
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens).long()
        if len(bounds) != rows + 1 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
            raise ArgumentError(f"cu_seqlens is {bounds.tolist()}, expected 0 and {rows} ascending ends")
        return torch.repeat_interleave(torch.arange(rows), bounds.diff())
    if index is None:
        return None
    index = torch.as_tensor(index).long().reshape(-1)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
        raise ArgumentError(f"index names rows {int(index.min())} to {int(index.max())}, there are {rows}")
    return index
