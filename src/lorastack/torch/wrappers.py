"""What wraps a model or its modules and has no part in their names: compiled, parallel, sharded, PEFT's, offloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

#: Under these names a wrapper holds what it wraps, whatever it is.
_INSIDE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Where(NamedTuple):
    """A module, and what holds it under which name."""

    module: nn.Module
    parent: nn.Module
    key: str


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that compiling, parallel training or PEFT wrapped, as transformers made it."""
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of a model once, itself first: as ``model.modules()``, in a fraction of its time."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


#: Under this name a saved module holds the base's own, in its ``__dict__``: no part of the model, but of its copies.
REPLACED = "_lorastack_replaces"


def _own(module: nn.Module) -> nn.Module:
    """The base's own module, where a saved one stands in its place."""
    own: nn.Module = module.__dict__.get(REPLACED, module)
    return own


def parents_of(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Every module of a model -> those that hold it."""
    parents: dict[nn.Module, list[nn.Module]] = {model: []}
    for module in (modules := [model]):
        for child in module._modules.values():
            if child is None:
                continue
            child = _own(child)
            if child in parents:
                parents[child].append(module)
            else:
                parents[child] = [module]
                modules.append(child)
    return parents


def index_of(model: nn.Module) -> dict[str, Where]:
    """Path -> module, for every module of a model; what is wrapped stands under its wrapper's path."""
    index: dict[str, Where] = {}

    def visit(where: Where, path: str) -> None:
        index[path] = where
        module = where.module
        inside = _inner_key(module)
        for key, child in module._modules.items():
            if child is not None:
                own = path if key == inside else f"{path}.{key}" if path else key
                visit(Where(_own(child), module, key), own)

    visit(Where(model, model, ""), "")
    return index


def offloaded_to(module: nn.Module) -> torch.device | None:
    """Where accelerate computes with a module whose weights it keeps elsewhere; None for any other."""
    hook = getattr(module, "_hf_hook", None)
    for one in [hook, *getattr(hook, "hooks", ())]:
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def tensor_at_hand(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter's numbers, also where accelerate keeps them elsewhere; None where they are not to be had."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
        return tensor if isinstance(tensor, torch.Tensor) else None
    hook = getattr(module, "_hf_hook", None)
    for one in [hook, *getattr(hook, "hooks", ())]:
        weights = getattr(one, "weights_map", None)
        if weights is not None and name in weights:
            found = weights[name]
            return found if isinstance(found, torch.Tensor) else None
    return None


def _inner(model: nn.Module) -> nn.Module | None:
    if _is_peft(model) and "base_model" in model._modules:  # PeftModel, then its tuner, which holds the model
        tuner = model._modules["base_model"]
        return None if tuner is None else tuner._modules.get("model", tuner)
    key = _inner_key(model)
    return None if key is None else model._modules.get(key)


def _inner_key(module: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps; None for what is no wrapper."""
    names = module._modules
    if not _INSIDE.isdisjoint(names):
        return next(key for key in _INSIDE if key in names)
    if isinstance(module, _PARALLEL):
        return "module"
    if _is_peft(module):
        return next((key for key in ("base_layer", "original_module") if key in names), None)
    return None


def _is_peft(module: Any) -> bool:
    return type(module).__module__.startswith("peft.")
