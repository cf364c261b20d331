"""Forward passes: where one begins and ends, what it is held to, and the moments between them.

A pass begins at the outermost hooked call: the model, or an encoder, a vision tower, a block or a single layer that is
called alone. There the context's plan is read once; the hooks below read a plain thread-local, since a ContextVar would
break a compiled graph in every layer. Whatever changes what a pass reads happens between passes: it waits for those
that run, and those that would begin wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lorastack.errors import ArgumentError
from lorastack.torch.activation import Acting, Activation
from lorastack.torch.plan import Plan, batch_of, is_uneven, plan_of_context

_NUMBERS = itertools.count(1)
#: How often a change that waits looks whether the passes it waits for are still there.
_LOOK = 0.02
_OURS = str(Path(__file__).parent)


class Pass:
    """One forward pass of one handle, in one thread."""

    __slots__ = tuple("acting entry frame length logits mixture number outer rows shrunk thread uneven".split())

    def __init__(self, number: int, entry: Any) -> None:
        #: Of the handle: compiled code compares numbers, which it may keep as constants.
        self.number = number
        self.entry = entry
        self.thread = threading.get_ident()
        #: What called the entry. Held itself, since the place in memory of one that is gone may be another's by now.
        self.frame: FrameType | None = None
        self.outer: Pass | None = None
        #: The scales by row and what they come to, and the rows of the batch; None without rows.
        self.mixture: Any = None
        self.rows = 0
        #: Tokens of a row at the entry, and whether the rows have pictures of several sizes.
        self.length = 0
        self.uneven = False
        self.logits: torch.Tensor | None = None
        #: What the last inputs came to, of layers by pages.
        self.shrunk: tuple[Any, ...] = ()
        #: Where adapters with invocation tokens act.
        self.acting: Acting = {}

    def is_shared(self, ids: torch.Tensor) -> bool:
        """Whether what is looked up is one for all rows: positions ``[1, tokens]`` or ``[tokens]``."""
        if self.rows < 2 or self.length == 0:
            return False
        return ids.shape[0] == 1 if ids.dim() == 2 else ids.dim() == 1 and ids.shape[0] != self.rows * self.length


class _Current(threading.local):
    running: Pass | None = None


#: The innermost pass of this thread.
CURRENT = _Current()


class Passes:
    """The passes of one handle."""

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        #: Grows when adapters come or go: what a plan made of the factors before is made anew.
        self.version = 0
        #: Of adapters that act from their invocation tokens on; None without such.
        self.activation: Activation | None = None
        self.holders: set[Any] = set()
        #: What sets scales between the passes of its thread, step by step; see `Handle.schedule`.
        self.schedule: Any = None
        self._live: set[Pass] = set()
        self._changer: int | None = None
        # Held by itself where nobody waits, since a condition's own way in is Python. One thread may take it twice: an
        # interrupt can come between taking it and what gives it back.
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._with_gradients: set[Plan | None] = set()
        self._went_back = False

    def enter(self, entry: Any, args: Any, kwargs: Any) -> Pass | None:
        """Begin a pass at ``entry``; None inside one of the same handle.

        Raises
        ------
        ArgumentError
            When this context has no rows while another has, or the batch is not the one that the rows are for.
        """
        outer = CURRENT.running
        if outer is not None and not _on_the_stack(outer):  # it was left by an interrupt
            self._forget(outer)
            outer = CURRENT.running
        if outer is not None and outer.number == self.number:
            return None
        schedule = self.schedule
        if schedule is not None and schedule.active and schedule.thread != threading.get_ident():
            raise ArgumentError(
                "a schedule of another thread sets the scales step by step, and this pass would get some of them; give "
                "this thread a pipeline and a handle of its own, or pass once the schedule has ended"
            )
        plan = self._plan(bool(getattr(entry, "training", False)))
        new = Pass(self.number, entry)
        new.frame = _caller()
        with self._lock:
            while self._changer is not None and self._changer != new.thread:
                self._turn.wait()
            self._live.add(new)
        try:
            if plan is not None and plan.mixtures is not None:
                new.mixture = plan.made(self.version)
                batch, new.length = batch_of(args, kwargs)
                new.rows = plan.check_batch(batch)
                new.uneven = is_uneven(kwargs, new.rows)
                new.logits = plan.logits_of(kwargs)
                new.mixture.foresee(new.rows * max(new.length, 1))
            if self.activation is not None:
                new.acting = self.activation.of(args, kwargs)
        except BaseException:
            self._end(new)
            raise
        new.outer, CURRENT.running = outer, new
        return new

    def leave(self, entry: Any, output: Any = None) -> None:
        """End the pass that began at ``entry``; nothing when it did not begin one."""
        running = CURRENT.running
        if running is not None and running.number == self.number and running.entry is entry:
            if running.acting and self.activation is not None:
                self.activation.left(output, running.acting)
            CURRENT.running = running.outer
            self._end(running)

    def release(self) -> None:
        """Let passes begin again, if this thread kept them from it: an interrupt may have left `between` unfinished."""
        with self._turn:
            if self._changer == threading.get_ident():
                self._changer = None
                self._turn.notify_all()

    def __deepcopy__(self, memo: Any) -> Passes:
        return self  # hooks that go along when a model is copied

    def __reduce__(self) -> Any:
        raise not_pickled()

    @contextlib.contextmanager
    def between(self, doing: str) -> Iterator[None]:
        """A moment without passes.

        Raises
        ------
        ArgumentError
            When this thread is inside a pass: it would wait for itself.
        """
        running = CURRENT.running
        if running is not None and running.number == self.number and _on_the_stack(running):
            raise ArgumentError(f"{doing} inside a forward pass; do it before or after")
        me = threading.get_ident()
        nested = self._changer == me
        if not nested:
            with self._turn:
                while self._changer is not None:
                    self._turn.wait()
                self._changer = me
        try:
            with self._turn:
                while any(_on_the_stack(one) for one in self._live):
                    self._turn.wait(_LOOK)
            yield
        finally:
            if not nested:
                with self._turn:
                    self._changer = None
                    self._turn.notify_all()

    def _plan(self, training: bool) -> Plan | None:
        """The plan that this context's passes have; None for the stack's own scales."""
        plan = plan_of_context(self.number)
        if plan is None and self._with_gradients and _goes_back():
            # Checkpoints compute again what was computed before the way back, perhaps under rows that are left by now.
            if len(self._with_gradients) > 1:
                raise ArgumentError(
                    "gradient checkpointing computes a pass again, and there were passes of several mixtures; "
                    "call backward() inside their rows()"
                )
            self._went_back = True
            return next(iter(self._with_gradients))
        if plan is None and self.holders:
            raise ArgumentError(
                "this context has no rows, while another has: which adapters is this pass to have? In a thread begun "
                "inside rows(): plan = handle.current() before it, `with plan:` in it, or "
                "contextvars.copy_context().run; for the stack's own scales: `with handle.plain():`"
            )
        if training and torch.is_grad_enabled() and not _goes_back():
            if self._went_back:
                self._with_gradients, self._went_back = set(), False
            if len(self._with_gradients) < 2:
                self._with_gradients.add(plan)
        return plan

    def _forget(self, stale: Pass) -> None:
        CURRENT.running = stale.outer
        if stale.number == self.number:
            self._end(stale)

    def _end(self, one: Pass) -> None:
        one.frame = None
        with self._lock:
            self._live.discard(one)
            if self._changer is not None:
                self._turn.notify_all()


def not_pickled() -> ArgumentError:
    """What whoever pickles a model is told, by whichever of our hooks comes first."""
    return ArgumentError("a model that has a stack attached cannot be pickled; detach it, or save its state_dict()")


def _goes_back() -> bool:
    """Whether this is inside a call of backward()."""
    return bool(torch._C._current_graph_task_id() != -1)


def eager(function: Any) -> Any:
    """``function`` as compiled code leaves it alone: it runs, and is not traced."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    getattr(function, "__func__", function)._torchdynamo_disable = True  # what comes to compile later looks for this
    return function


def _caller() -> FrameType:
    """Which frame called the hook: the pass lasts as long as that."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and (
        (file := frame.f_code.co_filename).startswith(_OURS) or "/torch/_dynamo/" in file
    ):
        frame = frame.f_back
    return frame


def _on_the_stack(one: Pass) -> bool:
    """Whether the call that began a pass is still running; an interrupt may have left it without a word."""
    frame = sys._current_frames().get(one.thread)
    while frame is not None:
        if frame is one.frame:
            return True
        frame = frame.f_back
    return False
