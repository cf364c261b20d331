"""Schedule: scales that a pipeline's steps set, one after the other, by the callback that pipelines take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lorastack.errors import ArgumentError
from lorastack.ways import Way, ways

_WITHIN = Way("use it as `with handle.schedule(...) as callback:`", None)
_ANEW = Way("make one with handle.schedule() for each call", None)


class Scaled(Protocol):
    """A handle, as far as a schedule knows it."""

    attached: bool

    @property
    def scales(self) -> dict[str, float]: ...
    def _set_scales(self, scales: Mapping[str, float]) -> None: ...


class Schedule:
    """What `Handle.schedule` gives: a callback for ``callback_on_step_end``, and a context manager.

    The scales of step 0 hold from the beginning, those of the next step from the end of each. After the last step the
    scales are as they were before; inside ``with`` that is at its end, and each call of the pipeline begins anew.
    """

    def __init__(self, handle: Scaled, scales: Mapping[str, Callable[[int], float]]) -> None:
        self._handle, self._scales = handle, dict(scales)
        self._before = {name: handle.scales[name] for name in self._scales}
        self._next = 0
        self._held = False
        self.thread = threading.get_ident()
        #: Whether it sets scales still.
        self.active = True

    @property
    def names(self) -> frozenset[str]:
        """The adapters whose scales it sets."""
        return frozenset(self._scales)

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The end of a step of ``pipe``, as diffusers calls it.

        Raises
        ------
        ArgumentError
            When it has ended, or the pipeline's steps are not the ones that are due.
        """
        if not self.active:
            raise ArgumentError(
                "this schedule ended with the pipeline's last step, so that step 0 of this call did not have its scales"
                + ways(_ANEW, _WITHIN)
            )
        try:
            count = getattr(pipe, "num_timesteps", None)
            if not isinstance(count, int) and not self._held:
                kind = type(pipe).__name__
                raise ArgumentError(f"{kind} does not say how many steps it takes (num_timesteps){ways(_WITHIN)}")
            if step != self._next:
                raise ArgumentError(
                    f"step {step} of {type(pipe).__name__} ended, expected {self._next}; a call was broken off, or "
                    "there are two"
                )
            if count is None or step + 1 < count:
                self._set(step + 1)
            elif self._held:
                self._set(0)
            else:
                self.close()
        except BaseException:
            self.close()
            raise
        return callback_kwargs

    def close(self) -> None:
        """Give the adapters the scales they had before; a second call does nothing."""
        if self.active:
            self.active = False
            if self._handle.attached:
                there = self._handle.scales
                self._handle._set_scales({name: scale for name, scale in self._before.items() if name in there})

    def __enter__(self) -> Schedule:
        self._held = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _set(self, step: int) -> None:
        self._handle._set_scales({name: scale(step) for name, scale in self._scales.items()})
        self._next = step
