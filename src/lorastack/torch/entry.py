"""Entries: the modules at which a forward pass can begin, with the hooks that begin and end it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

from torch import nn

from lorastack.torch.parts import roots_of
from lorastack.torch.passes import CURRENT, Passes, eager, not_pickled
from lorastack.torch.wrappers import parents_of


class Outside(partial):
    """A hook that compiled code leaves alone; an object, since a function has no word in how it is pickled.

    A partial, whose call is no code of Python's that torch could compile.
    """

    def __new__(cls, entry: Entry, hook: Any) -> Outside:
        made = super().__new__(cls, eager(hook))
        made.__self__ = entry  # type: ignore[attr-defined]
        return made

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def __reduce__(self) -> Any:
        raise not_pickled()


class Entry:
    """One module at which a pass of a handle can begin."""

    def __init__(self, passes: Passes, module: nn.Module, is_root: bool) -> None:
        self.passes, self.number, self.module = passes, passes.number, module
        # Those of the whole model run outside of compiled code, those inside are traced with it.
        inside = (self._begin, self._end)
        self._hooks = (Outside(self, self._enter), Outside(self, self._leave)) if is_root else inside
        self._eager = _outside_compiled_code()
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Set the hooks."""
        if len(self._handles) == 2:
            return
        self.detach()
        begin, end = self._hooks
        register = self.module.register_forward_pre_hook
        self._handles.append(register(begin, with_kwargs=True, prepend=True))
        self._handles.append(self.module.register_forward_hook(end, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        for hooks in (self.module._forward_pre_hooks, self.module._forward_hooks):  # one that an interrupt left
            for key in [key for key, hook in hooks.items() if hook in self._hooks]:
                hooks.pop(key)

    def __deepcopy__(self, memo: Any) -> Entry:
        return self  # a hook that goes along when a model is copied

    def __reduce__(self) -> Any:
        raise not_pickled()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.passes.enter(module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.passes.leave(module, output)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        running = CURRENT.running
        if running is None or running.number != self.number:
            self._eager.enter(self, module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = CURRENT.running
        if running is not None and running.entry is module:
            self._eager.leave(self, module, args, kwargs, output)


class _Eager(NamedTuple):
    enter: Any
    leave: Any


@cache
def _outside_compiled_code() -> _Eager:
    """The beginning and the end of a pass as compiled code calls them; made once, since it takes as long as a hook."""
    return _Eager(eager(Entry._enter), eager(Entry._leave))


def entries_of(passes: Passes, model: nn.Module, hooked: Iterable[nn.Module]) -> list[Entry]:
    """The model or each part of a pipeline, and what of it is called alone: models inside it (encoders, vision
    towers) and the blocks of lists.
    """
    parents = parents_of(model)
    above: dict[nn.Module, None] = {}  # the modules with a hooked one below them
    below = list(hooked)
    for module in below:
        for parent in parents[module]:
            if parent not in above:
                above[parent] = None
                below.append(parent)
    roots = roots_of(model)
    tops = {id(model), *map(id, roots)}
    inside = [module for module in above if id(module) not in tops and _is_called_alone(module, parents[module])]
    return [*(Entry(passes, root, True) for root in roots), *(Entry(passes, module, False) for module in inside)]


def _is_called_alone(module: nn.Module, parents: list[nn.Module]) -> bool:
    return hasattr(type(module), "base_model_prefix") or any(isinstance(parent, nn.ModuleList) for parent in parents)
