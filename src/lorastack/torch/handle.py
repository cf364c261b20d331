"""Handle: an attached stack - hot scales, push and pop, mixtures by row, detach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import nn

from lorastack.base.experts import single
from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, Problems, UnknownNameError, UnsupportedError, did_you_mean
from lorastack.torch.assembly import Assembly, Live, Report
from lorastack.torch.experts import LiveParameter
from lorastack.torch.layer import LiveLayer
from lorastack.torch.layout import without_rows
from lorastack.torch.parts import Parts, roots_of
from lorastack.torch.plan import Plan, plan_of_context, token_rows
from lorastack.torch.rows import Mixture
from lorastack.torch.schedule import Schedule
from lorastack.torch.tiles import Wanted
from lorastack.torch.unused import Unused
from lorastack.torch.ways import choice

__all__ = ["ATTACHED", "Handle", "Report"]

#: Models that have a stack, so that none gets a second one by mistake; a model that is dropped takes its handle along.
ATTACHED: WeakKeyDictionary[nn.Module, ReferenceType[Handle]] = WeakKeyDictionary()


class Handle:
    """An attached stack; made by `attach`. Also a context manager that detaches at its end.

    The handle has its own copy of the stack and is the only way to change what is attached. Every change is made
    between forward passes, and is undone as a whole when anything stops it. It may be used from several threads.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, allow_partial: bool) -> None:
        self.model = model
        self._assembly = Assembly(model, dtype, allow_partial)
        self._schedule: Schedule | None = None
        #: The version of what is attached that all has rows.
        self._fit = -1
        self.attached = True

    # What is attached

    @property
    def report(self) -> Report:
        """What attaching found."""
        return self._assembly.report

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order; those of the stack's second list are ``adapter0``, ``adapter1``, ..."""
        return self._assembly.names

    @property
    def scales(self) -> dict[str, float]:
        """Adapter name -> its present scale."""
        return {candidate.name: candidate.scale for candidate in self._assembly.candidates}

    @property
    def stack(self) -> LoraStack:
        """A copy of the stack as attached, under the model's own weight names."""
        stack = LoraStack()
        for candidate in self._assembly.candidates:
            if isinstance(candidate.adapter, LoadedLora):
                stack.push(candidate.adapter, candidate.scale)
            else:
                stack.push_adapter(candidate.adapter)
        return stack

    @property
    def _layers(self) -> dict[str, Live]:
        return self._assembly.layers

    def unused(self) -> Unused:
        """The weights that no pass has come to since they were attached."""
        names = [name for name, layer in self._assembly.layers.items() if not layer.reached]
        return Unused(
            tuple(name for name in names if single(name) is None), tuple(name for name in names if single(name))
        )

    def __repr__(self) -> str:
        what = ", ".join(f"{name}:{scale:g}" for name, scale in self.scales.items())
        return f"Handle({type(self.model).__name__}, [{what}]{'' if self.attached else ', detached'})"

    # Changes

    def set_scale(self, name: str, scale: float) -> None:
        """Give an adapter another scale, from the next forward pass on: microseconds, nothing is compiled again."""
        self.set_scales({name: scale})

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give several adapters other scales at once; a pass has all of them or none.

        Raises
        ------
        UnknownNameError
            Listing the names there are; nothing is changed then.
        ArgumentError
            When a scale is no finite number, in the type a layer computes in too; nothing is changed then.
        """
        schedule = self._schedule
        if schedule is not None and schedule.active and (due := schedule.names & set(scales)):
            raise ArgumentError(f"a schedule sets the scale of {', '.join(sorted(due))} at each step until it ends")
        self._set_scales(scales)

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        self._assembly.set_scales({self._position(name): _checked(scale) for name, scale in scales.items()})

    def schedule(self, scales: Mapping[str, Callable[[int], float]]) -> Schedule:
        """A callback that sets scales between a pipeline's steps: ``pipe(..., callback_on_step_end=callback)``.

        Each function is given the number of a step, from 0 on, and gives the scale that the adapter has in it. Step 0's
        scales hold at once, for text encoders too, which run before the steps. After the last step the scales are what
        they were; use it as ``with handle.schedule(...) as callback:`` for several calls, or where one may be broken
        off. Only the thread that made it may pass meanwhile: give another one a pipeline and a handle of its own.

        Raises
        ------
        UnknownNameError
            Listing the names there are.
        ArgumentError
            When a scale is no finite number, or another schedule sets scales still.

        Examples
        --------
        >>> from types import SimpleNamespace
        >>> from lorastack import LoadedLora
        >>> from lorastack.torch import attach
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> a, b = torch.ones(1, 3).numpy(), torch.ones(2, 1).numpy()
        >>> handle = attach(model, LoadedLora.from_tensors({"0.weight": (a, b)}, name="ink"))
        >>> pipe = SimpleNamespace(num_timesteps=3)
        >>> callback, seen = handle.schedule({"ink": lambda step: 1 - step / 2}), []
        >>> for step in range(3):
        ...     seen.append(handle.scales["ink"])
        ...     _ = callback(pipe, step, None, {})
        >>> seen, handle.scales["ink"]
        ([1.0, 0.5, 0.0], 1.0)
        """
        self._check_free("schedule()")
        if self._schedule is not None and self._schedule.active:
            raise ArgumentError(
                "another schedule sets scales still; it ends with the pipeline's last step, or with its close()"
            )
        for name in scales:
            self._position(name)
        new = Schedule(self, scales)
        self._schedule = self._assembly.passes.schedule = new
        try:
            new._set(0)
        except BaseException:
            new.active = False
            raise
        return new

    def push(self, adapter: LoadedLora | LoraAdapter, scale: float = 1.0) -> str:
        """Attach one more adapter on top; returns its name here.

        Raises
        ------
        LoraStackError
            Listing everything that does not fit; nothing is changed then.
        """
        self._check_free("push()")
        return self._assembly.add([(adapter, _checked(scale))])

    def pop(self) -> tuple[LoadedLora | LoraAdapter, float] | None:
        """Take the last adapter off and return it with its scale; None when there is none."""
        self._check_free("pop()")
        last = len(self._assembly.candidates) - 1
        return self._assembly.remove(last) if last >= 0 else None

    def remove(self, name: str) -> tuple[LoadedLora | LoraAdapter, float]:
        """Take the adapter of that name off and return it with its scale."""
        self._check_free("remove()")
        return self._assembly.remove(self._position(name))

    def replace(self, name: str, adapter: LoadedLora | LoraAdapter, scale: float | None = None) -> str:
        """Put another adapter in place of one, at its scale unless given; the new one comes on top."""
        self._check_free("replace()")
        position = self._position(name)
        old = self._assembly.candidates[position]
        return self._assembly.replace(position, adapter, old.scale if scale is None else _checked(scale))

    # Rows

    @contextlib.contextmanager
    def rows(
        self,
        mixtures: Sequence[Mapping[str, float]],
        *,
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        index: Sequence[int] | torch.Tensor | None = None,
        copies: int = 1,
        way: str | None = None,
    ) -> Iterator[Handle]:
        """Inside this context row i of the batch has the adapters and scales of ``mixtures[i]``, and no others.

        A row's scales take the place of the stack's; an adapter it does not name is off for it. It holds for this
        thread or task only: another has its own, and one that has none may not pass meanwhile, since it would not be
        told which adapters it means (see `current` and `plain`).

        Parameters
        ----------
        mixtures
            One mapping of adapter name to scale for each row of the batch.
        cu_seqlens
            For packed input: where each row begins, and the end, ``[rows + 1]``, as flash attention takes it.
        index
            For packed input: the row of every token, ``[tokens]``.
        copies
            How often each row stands in the batch, side by side; transformers' ``generate`` is asked for its beams and
            returned sequences.
        way
            How linear layers compute the rows. By itself that depends on the layer and on what is attached, and a row
            is the same to the bit whatever adapters its neighbours have. ``"fast"`` takes what is faster for this
            batch, and gives that up: a row may differ in its last bits beside other neighbours. ``"dense"``,
            ``"each"`` and ``"pages"`` ask for one; a layer that cannot have it has its own. `Plan.ways` says what was
            taken.

        Raises
        ------
        UnknownNameError
            Listing every name that is not attached.
        ArgumentError
            When no way is named so, listing those there are.
        ShapeError
            In a pass whose batch has another number of rows.
        UnsupportedError
            Listing every adapter with biases of the base, saved modules, new tokens or experts, which have no row; on a
            pipeline, which makes rows of its own of the prompts; and for ``way="pages"`` without what they need.
        """
        self._check_attached()
        if isinstance(self.model, Parts):
            raise UnsupportedError(
                f"rows() cannot tell the rows of a {type(self.model).__name__}: for guidance, and for several images, "
                "it has each prompt in a batch several times; call it once for each mixture, between set_scales()"
            )
        mixtures = [dict(mixture) for mixture in mixtures]
        self._wanted(mixtures)
        if copies < 1:
            raise ArgumentError(f"copies is {copies}; each row stands at least once")
        choice.check_name(way)
        choice.check_pages(way, self._mixed_layers())
        rows = token_rows(cu_seqlens, index, len(mixtures))
        with self._plan(mixtures, rows, copies, way):
            yield self

    def plain(self) -> Plan:
        """A plan of the stack's own scales: ``with handle.plain():`` passes beside others' rows."""
        self._check_attached()
        return self._plan(None, None, 1)

    def current(self) -> Plan:
        """The plan that holds here: ``with plan:`` in another thread gives its passes the same rows."""
        return plan_of_context(self._assembly.passes.number) or self.plain()

    def _plan(
        self,
        mixtures: Sequence[Mapping[str, float]] | None,
        index: torch.Tensor | None,
        copies: int,
        way: str | None = None,
    ) -> Plan:
        assembly = self._assembly

        def make(now: Sequence[Mapping[str, float]]) -> Mixture:
            layouts = assembly.layouts()
            paged = {layer.layout: None for layer in self._mixed_layers() if choice.may_be_paged(layer, way)}
            return Mixture(self._wanted(now), len(self.names), index, layouts, way, list(paged))

        def ways(made: Mixture) -> dict[str, str]:
            return {layer.name: made.taken.get(layer.name) or choice.said(layer) for layer in assembly.live_layers()}

        def write(made: Mixture, others: Sequence[Mapping[str, float]]) -> None:
            wanted = self._wanted(others)
            with assembly.passes.between("a plan is written"):
                made.write(wanted)

        passes = assembly.passes
        return Plan(passes.number, passes.holders, mixtures, make, index, copies, write, way, ways)

    def _mixed_layers(self) -> list[LiveLayer]:
        self._assembly.layouts()
        return [layer for layer in self._assembly.live_layers() if layer.way is not None]

    def _wanted(self, mixtures: Sequence[Mapping[str, float]]) -> list[Wanted]:
        """The adapters of each row by position, in the order of the stack, without those at scale 0."""
        if not mixtures:
            raise ArgumentError("rows() needs a mixture for each row of the batch; an empty one, {}, is the base")
        at = {name: n for n, name in enumerate(self.names)}
        unknown = sorted({name for mixture in mixtures for name in mixture if name not in at})
        if unknown:
            near = did_you_mean(unknown[0], self.names)
            said = ", ".join(unknown)
            raise UnknownNameError(f"no adapter is named {said}; attached are {', '.join(self.names)}{near}")
        wanted = [sorted((at[name], _checked(scale)) for name, scale in mixture.items()) for mixture in mixtures]
        self._refuse_without_rows()
        return [[one for one in mine if one[1] != 0] for mine in wanted]

    def _refuse_without_rows(self) -> None:
        """UnsupportedError that lists what has no row; looked for once after adapters came or went."""
        version = self._assembly.passes.version
        if self._fit == version:
            return
        problems = Problems("these adapters cannot be mixed by row")
        for n, candidate in enumerate(self._assembly.candidates):
            for why in self._without_rows(n):
                problems.add(f"{candidate.name}: {why}; remove it from the handle first")
        problems.raise_any(UnsupportedError)
        self._fit = version

    def _without_rows(self, entry: int) -> list[str]:
        """What of an adapter acts on the whole batch at once."""
        slots = [
            (layer, slot) for layer in self._assembly.layers.values() for slot in layer.slots if slot.entry == entry
        ]
        found = []
        modules = self._assembly.modules_now()
        for layer, _ in slots:
            path = layer.place.name.rpartition(".")[0].rpartition(".")[0]
            if why := without_rows(layer.place.name, modules.get(path)):
                found.append(why)
        found = list(dict.fromkeys(found))
        found += dict.fromkeys(
            why for layer, _ in slots if isinstance(layer, LiveParameter) and (why := layer.without_rows())
        )
        found += sorted({f"it has {patch.what}" for patch in self._assembly.patches[entry]})
        return found

    # The end

    def detach(self) -> None:
        """Take everything off; the model is then what it was before, to the bit. A second call does nothing."""
        if not self.attached:
            return
        self._check_free("detach()")
        self._assembly.clear()
        self.attached = False
        for root in roots_of(self.model):
            ATTACHED.pop(root, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def __copy__(self) -> Handle:
        raise ArgumentError(f"{self!r} is what is attached to one live model, and cannot be copied; copy its .stack")

    def __deepcopy__(self, memo: Any) -> Handle:
        return self.__copy__()

    def __reduce__(self) -> Any:
        raise ArgumentError(f"{self!r} is what is attached to one live model, and cannot be pickled; pickle its .stack")

    def _check_free(self, doing: str) -> None:
        self._check_attached()
        plan = plan_of_context(self._assembly.passes.number)
        if plan is not None and plan.mixtures is not None:
            raise ArgumentError(f"{doing} inside rows(): its rows are of the adapters there are; leave rows() first")

    def _position(self, name: str) -> int:
        self._check_attached()
        for position, candidate in enumerate(self._assembly.candidates):
            if candidate.name == name:
                return position
        there = ", ".join(self.names) or "none"
        raise UnknownNameError(f"no adapter is named {name!r}; attached are {there}{did_you_mean(name, self.names)}")

    def _check_attached(self) -> None:
        if not self.attached:
            raise ArgumentError("this handle is detached; attach the stack again")


def _checked(scale: float) -> float:
    if not isinstance(scale, (int, float)) or scale != scale or scale in (float("inf"), float("-inf")):
        raise ArgumentError(f"a scale is a finite number, got {scale!r}")
    return float(scale)
