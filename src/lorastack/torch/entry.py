"""Entries: the modules at which a forward pass can begin, with the hooks that begin and end it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from lorastack.torch.passes import CURRENT, Passes, eager, not_pickled


class Outside(partial):  # whose call is no Python frame, which would be compiled
    """A hook that compiled code leaves alone; an object, since a function has no word in how it is pickled."""

    __self__: Entry

    @classmethod
    def of(cls, entry: Entry, hook: Any) -> Outside:
        made = cls(eager(hook))
        made.__self__ = entry  # as a bound method has it
        return made

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def __reduce__(self) -> Any:
        raise not_pickled()


class Entry:
    """One module at which a pass of a handle can begin."""

    def __init__(self, passes: Passes, module: nn.Module, is_root: bool, layers: Callable[[], Any]) -> None:
        self.passes, self.number, self.module, self.is_root = passes, passes.number, module, is_root
        self._layers = layers
        self._enter, self._leave = Outside.of(self, self._really_enter), Outside.of(self, self._really_leave)
        self._hooks = (self._enter, self._leave, self._begin, self._end)
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Set the hooks. Those of the whole model run outside of compiled code, those inside are traced with it."""
        if len(self._handles) == 2:
            return
        self.detach()
        begin, end = (self._enter, self._leave) if self.is_root else (self._begin, self._end)
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

    def _really_enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.passes.enter(module, args, kwargs, self._layers)

    def _really_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.passes.leave(module)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        running = CURRENT.running
        if running is None or running.number != self.number:
            self._enter(module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = CURRENT.running
        if running is not None and running.entry is module:
            self._leave(module, args, kwargs, output)


def entries_of(passes: Passes, model: nn.Module, hooked: Iterable[nn.Module], layers: Callable[[], Any]) -> list[Entry]:
    """The model, and what of it is called alone: models inside it (encoders, vision towers) and the blocks of lists."""
    wanted = {id(module) for module in hooked}
    found = [Entry(passes, model, True, layers)]
    blocks = {id(block) for module in model.modules() if isinstance(module, nn.ModuleList) for block in module}
    seen: dict[int, bool] = {}

    def holds(module: nn.Module) -> bool:
        """Whether a hooked module lies below this one; entries are noted on the way."""
        known = seen.get(id(module))
        if known is not None:
            return known
        below = [holds(child) or id(child) in wanted for child in module._modules.values() if child is not None]
        seen[id(module)] = inside = any(below)
        if inside and module is not model and (id(module) in blocks or hasattr(module, "base_model_prefix")):
            found.append(Entry(passes, module, False, layers))
        return inside

    holds(model)
    return found
