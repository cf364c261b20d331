"""Assembly: what is attached to a model - layers, patches, entries, scales - changed as a whole or not at all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.errors import LoraStackError, LoraStackWarning, Problems, UnsupportedError
from lorastack.torch.compiled import forget_compiled
from lorastack.torch.entry import Entry, entries_of
from lorastack.torch.experts import LiveParameter
from lorastack.torch.layer import LiveLayer
from lorastack.torch.passes import Passes
from lorastack.torch.places import Places
from lorastack.torch.prepare import Candidate, prepare
from lorastack.torch.prepared import Prepared
from lorastack.torch.saved import Patch
from lorastack.torch.scales import Scales

Live = LiveLayer | LiveParameter
Adapters = Sequence[tuple[LoadedLora | LoraAdapter, float]]


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


class Assembly:
    """The attached adapters of one model. Every change here happens between passes."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, allow_partial: bool) -> None:
        self.model, self.dtype, self.allow_partial = model, dtype, allow_partial
        self.places = Places(model)
        self.passes = Passes()
        self.layers: dict[str, Live] = {}
        self.patches: list[list[Patch]] = []
        self.candidates: list[Candidate] = []
        self.entries: list[Entry] = []
        self.scales = Scales()
        self.report = Report()
        #: Who owns this: as long as there are hooks, so is the handle.
        self.owner: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(candidate.name for candidate in self.candidates)

    def live_layers(self) -> list[LiveLayer]:
        """The layers that rows can be told apart at."""
        return [layer for layer in self.layers.values() if isinstance(layer, LiveLayer)]

    def add(self, adapters: Adapters) -> None:
        """Attach several adapters; either all of them or, when something does not fit, none."""
        self._check_places()
        candidates, prepared, patches, missing = self.prepare(adapters)
        with self.whole("an adapter is attached"):
            first = len(self.candidates)
            for entry, parts in enumerate(prepared, first):
                for part in parts:
                    layer = self.layers.get(part.place.name)
                    if layer is None:
                        layer = self.layers[part.place.name] = self._layer_for(part)
                    layer.add(entry, part)
            self.candidates += candidates
            self.patches += patches
            self.report.missing |= missing
            self._settle()

    def remove(self, position: int) -> None:
        """Take one adapter off."""
        with self.whole("an adapter is taken off"):
            self._take_out(position)
            self._settle()

    def replace(self, position: int, adapter: LoadedLora | LoraAdapter, scale: float) -> None:
        """Put another adapter in place of one; it comes on top."""
        self._check_places()
        candidates, prepared, patches, missing = self.prepare([(adapter, scale)], without=position)
        with self.whole("an adapter is replaced"):
            self._take_out(position)
            entry = len(self.candidates)
            for part in prepared[0]:
                layer = self.layers.get(part.place.name)
                if layer is None:
                    layer = self.layers[part.place.name] = self._layer_for(part)
                layer.add(entry, part)
            self.candidates += candidates
            self.patches += patches
            self.report.missing |= missing
            self._settle()

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Other scales, by position, from the next pass on."""
        wanted = [scales.get(n, candidate.scale) for n, candidate in enumerate(self.candidates)]
        self.scales.check(wanted, self.names)
        with self.passes.between("a scale is set"), self._undone():
            for n, scale in scales.items():
                self.candidates[n] = replace(self.candidates[n], scale=scale)
            self._rescale()

    def clear(self) -> None:
        """Take everything off."""
        with self.passes.between("the stack is detached"):
            hooked = [layer for layer in self.layers.values() if layer.attached]
            for layer in self.layers.values():
                layer.detach()
            for patch in [patch for group in reversed(self.patches) for patch in group]:
                patch.detach()
            for entry in self.entries:
                entry.detach()
            self.layers, self.patches, self.entries = {}, [[] for _ in self.candidates], []
            if hooked:
                _say_forgotten(forget_compiled(self.model))

    def prepare(
        self, adapters: Adapters, without: int | None = None
    ) -> tuple[list[Candidate], list[list[Prepared]], list[list[Patch]], dict[str, list[str]]]:
        """Everything made ready, nothing changed; one error lists all that does not fit."""
        staying = [n for n in range(len(self.candidates)) if n != without]
        taken = {patch.claim: self.names[n] for n in staying for patch in self.patches[n]}
        names = [self.names[n] for n in staying]
        problems = Problems(f"the stack does not fit {type(self.model).__name__}")
        candidates, prepared, patches = [], [], []
        left_out: dict[str, list[str]] = {}
        for adapter, scale in adapters:
            candidate = Candidate.of(adapter, float(scale), names)
            try:
                parts, own, missing = prepare(candidate, self.places, self.dtype, self.allow_partial)
                Scales.check_parts(parts, candidate.scale, self.dtype)
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
        return candidates, prepared, patches, left_out

    @contextlib.contextmanager
    def whole(self, doing: str) -> Iterator[None]:
        """A change of what is attached: between passes, and undone when anything stops it, an interrupt included."""
        with self.passes.between(doing):
            before = {name for name, layer in self.layers.items() if layer.attached}
            with self._undone():
                yield
            after = {name for name, layer in self.layers.items() if layer.attached}
            self.passes.version += 1
            if before != after:
                _say_forgotten(forget_compiled(self.model))

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Bring everything back when the body is left by an error of any kind."""
        layers = [(name, layer, layer.attached, layer.state()) for name, layer in self.layers.items()]
        kept: dict[str, Any] = {
            "candidates": list(self.candidates),
            "patches": list(self.patches),
            "entries": list(self.entries),
            "report": replace(self.report, missing=dict(self.report.missing), matched=dict(self.report.matched)),
            "scales": self.scales.state(),
        }
        try:
            yield
        except BaseException:
            old = {id(layer) for _, layer, *_ in layers}
            for layer in [layer for layer in self.layers.values() if id(layer) not in old]:
                layer.detach()
            for patch in {id(p): p for group in (*self.patches, *kept["patches"]) for p in group}.values():
                patch.detach()
            for entry in [entry for entry in self.entries if entry not in kept["entries"]]:
                entry.detach()
            self.layers = {name: layer for name, layer, *_ in layers}
            self.candidates, self.patches, self.entries = kept["candidates"], kept["patches"], kept["entries"]
            self.report = kept["report"]
            self.scales.restore(kept["scales"])
            for _, layer, attached, state in layers:
                layer.detach()
                layer.restore(state)
                if attached:
                    layer.attach_again()
            for patch in [patch for group in self.patches for patch in group]:
                patch.attach()
            self.scales.write([candidate.scale for candidate in self.candidates])
            for layer in self.layers.values():
                if layer.needs_refresh:
                    layer.refresh()
            raise

    def _check_places(self) -> None:
        """UnsupportedError when a module that is hooked is no longer the model's: what it gets has no effect."""
        now = Places(self.model)
        gone = [
            name
            for name, layer in self.layers.items()
            if now.modules.get(name.rpartition(".")[0]) is not layer.place.module
        ]
        if gone:
            raise UnsupportedError(
                "modules were replaced since, so that the stack has no effect there; detach, and attach again",
                gone,
            )
        self.places = now

    def _layer_for(self, part: Prepared) -> Live:
        dtype = self.dtype or part.place.dtype
        if part.place.kind == "parameter":
            return LiveParameter(part.place, dtype)
        return LiveLayer(part.place, dtype, self.passes)

    def _take_out(self, position: int) -> None:
        for patch in self.patches.pop(position):
            patch.detach()
        name = self.candidates.pop(position).name
        self.report.missing.pop(name, None)
        for weight, layer in list(self.layers.items()):
            layer.remove(position)
            if not layer.slots:
                layer.detach()
                del self.layers[weight]

    def _settle(self) -> None:
        """Bring hooks, scales and the report in line with the adapters there are."""
        self.scales.lay_out(list(self.layers.values()), [c.scale for c in self.candidates])
        for layer in self.layers.values():
            layer.attach()
        for patch in [patch for group in self.patches for patch in group]:
            patch.attach()
        self._set_entries()
        self.report.matched = {
            c.name: [name for name, layer in self.layers.items() if any(s.entry == n for s in layer.slots)]
            for n, c in enumerate(self.candidates)
        }
        self.report.nbytes = sum(layer.nbytes for layer in self.layers.values())
        self._rescale()

    def _set_entries(self) -> None:
        hooked = [layer.place.module for layer in self.live_layers()]
        wanted = entries_of(self.passes, self.model, hooked, self.live_layers)
        there = {id(entry.module) for entry in self.entries}
        needed = {id(entry.module) for entry in wanted}
        for entry in [entry for entry in self.entries if id(entry.module) not in needed]:
            entry.detach()
        self.entries = [entry for entry in self.entries if id(entry.module) in needed]
        for entry in wanted:
            if id(entry.module) not in there:
                self.entries.append(entry)
                entry.attach()

    def _rescale(self) -> None:
        self.scales.write([c.scale for c in self.candidates])
        for candidate, patches in zip(self.candidates, self.patches, strict=True):
            for patch in patches:
                if patch.on != (candidate.scale != 0):
                    patch.on = candidate.scale != 0
        for layer in self.layers.values():
            if layer.needs_refresh:
                layer.refresh()


_said = False


def _say_forgotten(forgotten: bool) -> None:
    global _said
    if forgotten and not _said:
        _said = True
        warnings.warn(
            "hooks were set on or taken off a model that had been compiled and called; torch compiles what this "
            "process has compiled anew, since compiled code does not look for hooks",
            LoraStackWarning,
            stacklevel=6,
        )
