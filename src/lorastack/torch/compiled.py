"""Compiled code and hooks: torch compiles the hooks that are there, and does not look for them again."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from torch import nn

from lorastack.torch.wrappers import modules_of


def forget_compiled(model: nn.Module) -> bool:
    """Have torch compile anew, in this process, when code of ``model``'s classes was compiled; whether it was.

    Compiled code is kept by class, not by object: code without hooks, compiled for one model, would also serve another
    of its class. ``torch._dynamo.config.skip_nnmodule_hook_guards = False`` lets torch look itself, at a price.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.config.skip_nnmodule_hook_guards:
        return False
    noted = getattr(sys.modules.get("torch._dynamo.convert_frame"), "input_codes", None)
    if noted is not None and not noted.seen:  # nothing was compiled at all: found sooner than asked of each class
        return False
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as compiled_of

    if not any(compiled_of(code) for code in _codes(model)):
        return False
    dynamo.reset()
    return True


def _codes(model: nn.Module) -> set[CodeType]:
    """The code that a call of the model or of a module in it may run, and torch may have compiled."""
    found: set[CodeType] = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
    modules = modules_of(model)
    for cls in {type(module) for module in modules}:
        function: Any = cls.forward
        while function is not None:
            if code := getattr(function, "__code__", None):
                found.add(code)
            function = getattr(function, "__wrapped__", None)
    for own in [module.__dict__["forward"] for module in modules if "forward" in module.__dict__]:
        for one in (own, getattr(own, "_torchdynamo_orig_callable", None)):
            if code := getattr(getattr(one, "__func__", one), "__code__", None):
                found.add(code)
    return found
