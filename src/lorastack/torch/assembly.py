"""Assembly: what is attached to a model - layers, patches, entries, scales - changed as a whole or not at all."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.errors import LoraStackError, LoraStackWarning, Problems, UnsupportedError
from lorastack.torch.activation import Activation
from lorastack.torch.compiled import forget_compiled
from lorastack.torch.entry import Entry, entries_of
from lorastack.torch.experts import LiveParameter
from lorastack.torch.layer import LiveLayer
from lorastack.torch.layout import time_first
from lorastack.torch.passes import Passes
from lorastack.torch.places import Places
from lorastack.torch.prepare import Candidate, prepare
from lorastack.torch.prepared import Prepared
from lorastack.torch.saved import Patch, clashes
from lorastack.torch.scales import Scales
from lorastack.torch.tiles import Layout

T = TypeVar("T")

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


class _State(NamedTuple):
    """What an assembly was before a change."""

    layers: list[tuple[str, Live, bool, dict[str, Any]]]
    candidates: list[Candidate]
    patches: list[list[Patch]]
    entries: list[Entry]
    report: Report
    scales: Any


class Assembly:
    """The attached adapters of one model. Every change here happens between passes."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, allow_partial: bool) -> None:
        self.model, self.dtype, self.allow_partial = model, dtype, allow_partial
        self.passes = Passes()
        self.layers: dict[str, Live] = {}
        self.patches: list[list[Patch]] = []
        self.candidates: list[Candidate] = []
        self.entries: list[Entry] = []
        self.scales = Scales()
        #: How adapters lie at the layers, and of which version that is.
        self._laid: tuple[int, tuple[Layout, ...]] | None = None
        self._laying = threading.Lock()
        self._turned: set[nn.Module] | None = None
        #: The layers at which more than ``s`` follows the scales.
        self._followers: list[Live] = []
        self.report = Report()
        #: Who owns this: as long as there are hooks, so is the handle.
        self.owner: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(candidate.name for candidate in self.candidates)

    def modules_now(self) -> dict[str, nn.Module]:
        """Path -> module, of the model as it is."""
        return dict(self.model.named_modules())

    def live_layers(self) -> list[LiveLayer]:
        """The layers that rows can be told apart at."""
        return [layer for layer in self.layers.values() if isinstance(layer, LiveLayer)]

    def layouts(self) -> tuple[Layout, ...]:
        """How adapters lie at the layers, for plans by row; looked at once after adapters came or went."""
        with self._laying:
            if self._laid is None or self._laid[0] != self.passes.version:
                known: dict[Any, Layout] = {}
                for layer in self.layers.values():
                    if isinstance(layer, LiveLayer) or layer.without_rows() is None:
                        layer.lay_out(known)
                self._laid = (self.passes.version, tuple(known.values()))
            return self._laid[1]

    def add(self, adapters: Adapters) -> str:
        """Attach several adapters, all or, when something does not fit, none; returns the last one's name."""
        ready = self.prepare(adapters, self._places())
        return self._whole("an adapter is attached", partial(self._put_on, *ready))

    def remove(self, position: int) -> tuple[LoadedLora | LoraAdapter, float]:
        """Take one adapter off; returns it with its scale."""
        return self._whole("an adapter is taken off", partial(self._put_off, position))

    def replace(self, position: int, adapter: LoadedLora | LoraAdapter, scale: float) -> str:
        """Put another adapter in place of one; it comes on top, and its name is returned."""
        ready = self.prepare([(adapter, scale)], self._places(), without=position)

        def change() -> str:
            self._take_out(position)
            return self._put_on(*ready)

        return self._whole("an adapter is replaced", change)

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Other scales, by position, from the next pass on."""
        before: list[Candidate] = []

        def change() -> None:
            before.extend(self.candidates)
            self.scales.check([scales.get(n, one.scale) for n, one in enumerate(before)], self.names)
            set_to([replace(one, scale=scales.get(n, one.scale)) for n, one in enumerate(before)])

        def set_to(candidates: list[Candidate]) -> None:
            self.candidates = candidates
            self._rescale()

        self._all_or_nothing("a scale is set", change, lambda: set_to(before or self.candidates))

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
            self._followers = []
            if hooked:
                _say_forgotten(forget_compiled(self.model))

    def prepare(
        self, adapters: Adapters, places: Places, without: int | None = None
    ) -> tuple[list[Candidate], list[list[Prepared]], list[list[Patch]], dict[str, list[str]]]:
        """Everything made ready, nothing changed; one error lists all that does not fit."""
        staying = [n for n in range(len(self.candidates)) if n != without]
        taken = {claim: self.names[n] for n in staying for patch in self.patches[n] for claim in patch.claims}
        names = [self.names[n] for n in staying]
        problems = Problems(f"the stack does not fit {type(self.model).__name__}")
        candidates, prepared, patches = [], [], []
        left_out: dict[str, list[str]] = {}
        for adapter, scale in adapters:
            candidate = Candidate.of(adapter, float(scale), names)
            try:
                parts, own, missing = prepare(candidate, places, self.dtype, self.allow_partial)
                Scales.check_parts(parts, candidate.scale, self.dtype)
            except LoraStackError as error:
                for line in error.problems or [str(error)]:
                    problems.add(f"{candidate.name}: {line}")
                continue
            for line in clashes(candidate.name, own, taken, "attach"):
                problems.add(line)
            names.append(candidate.name)
            candidates.append(candidate)
            prepared.append(parts)
            patches.append(own)
            left_out |= {candidate.name: missing} if missing else {}
        problems.raise_any(UnsupportedError)
        return candidates, prepared, patches, left_out

    def _whole(self, doing: str, change: Callable[[], T]) -> T:
        """Make a change of what is attached; whatever stops it, everything is as it was before."""
        state = self._state()

        def counted() -> T:
            before = {name for name, layer in self.layers.items() if layer.attached}
            made = change()
            self.passes.version += 1
            if before != {name for name, layer in self.layers.items() if layer.attached}:
                _say_forgotten(forget_compiled(self.model))
            return made

        return self._all_or_nothing(doing, counted, partial(self._bring_back, state))

    def _all_or_nothing(self, doing: str, change: Callable[[], T], undo: Callable[[], None]) -> T:
        """Make a change between passes, and undo it when something stops it, an interrupt included."""
        try:
            with self.passes.between(doing):
                return change()
        except BaseException:
            self.passes.release()
            with self.passes.between(doing):
                undo()
            raise

    def _state(self) -> _State:
        return _State(
            [(name, layer, layer.attached, layer.state()) for name, layer in self.layers.items()],
            list(self.candidates),
            list(self.patches),
            list(self.entries),
            replace(self.report, missing=dict(self.report.missing), matched=dict(self.report.matched)),
            self.scales.state(),
        )

    def _bring_back(self, state: _State) -> None:
        old = {id(layer) for _, layer, *_ in state.layers}
        for layer in [layer for layer in self.layers.values() if id(layer) not in old]:
            layer.detach()
        for patch in {id(p): p for group in (*self.patches, *state.patches) for p in group}.values():
            patch.detach()
        for entry in [entry for entry in self.entries if entry not in state.entries]:
            entry.detach()
        self.layers = {name: layer for name, layer, *_ in state.layers}
        self.candidates, self.patches = list(state.candidates), list(state.patches)
        self.entries, self.report = list(state.entries), state.report
        self.scales.restore(state.scales)
        for _, layer, attached, own in state.layers:
            layer.detach()
            layer.restore(own)
            if attached:
                layer.attach_again()
        for entry in self.entries:
            entry.attach()
        for patch in [patch for group in self.patches for patch in group]:
            patch.attach()
        self.passes.version += 1
        self._set_activation()
        self._note_followers()
        self._rescale()

    def _places(self) -> Places:
        """The model as it is now; UnsupportedError when a module that is hooked is no longer in it."""
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
        return now

    def _layer_for(self, part: Prepared) -> Live:
        dtype = self.dtype or part.place.dtype
        if part.place.kind == "parameter":
            return LiveParameter(part.place, dtype, self.passes.number)
        return LiveLayer(part.place, dtype, self.passes)

    def _put_on(
        self,
        candidates: list[Candidate],
        prepared: list[list[Prepared]],
        patches: list[list[Patch]],
        missing: dict[str, list[str]],
    ) -> str:
        first = len(self.candidates)
        coming = Counter[str]()
        for part in itertools.chain(*prepared):
            coming[part.place.name] += part.rank
        for entry, parts in enumerate(prepared, first):
            for part in parts:
                name = part.place.name
                layer = self.layers.get(name)
                if layer is None:
                    layer = self.layers[name] = self._layer_for(part)
                layer.add(entry, part, coming[name])
                coming[name] -= part.rank
        self.candidates += candidates
        self.patches += patches
        self.report.missing |= missing
        self._settle()
        return self.names[-1] if self.candidates else ""

    def _put_off(self, position: int) -> tuple[LoadedLora | LoraAdapter, float]:
        gone = self.candidates[position]
        self._take_out(position)
        self._settle()
        return gone.adapter, gone.scale

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
        self._turned = turned = time_first(self.model) if self._turned is None else self._turned
        for layer in self.layers.values():
            layer.time_first = layer.place.module in turned
            layer.attach()
        for patch in [patch for group in self.patches for patch in group]:
            patch.attach()
        self._set_entries()
        self._set_activation()
        self.report.matched = {
            c.name: [name for name, layer in self.layers.items() if any(s.entry == n for s in layer.slots)]
            for n, c in enumerate(self.candidates)
        }
        self.report.nbytes = sum(layer.nbytes for layer in self.layers.values())
        self._note_followers()
        self._rescale()

    def _set_activation(self) -> None:
        slots = [slot for layer in self.live_layers() for slot in layer.slots]
        tokens = {slot.entry: slot.tokens for slot in slots if slot.tokens is not None}
        if tokens != (self.passes.activation.tokens if self.passes.activation else {}):
            self.passes.activation = Activation(tokens) if tokens else None

    def _set_entries(self) -> None:
        hooked = [layer.place.module for layer in self.live_layers()]
        wanted = entries_of(self.passes, self.model, hooked)
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
        for layer in self._followers:
            layer.refresh()

    def _note_followers(self) -> None:
        self._followers = [layer for layer in self.layers.values() if layer.needs_refresh]


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
