"""What PEFT saves beside low-rank updates, on a live model: trained biases, whole modules, new tokens.

None of it has a scale in PEFT: it is there while the adapter is, and away while the adapter's scale is 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lorastack.base.fit import changed_base, is_resized, same_numbers
from lorastack.core.factor import Factor
from lorastack.errors import Problems
from lorastack.torch.bypass import reads_weight
from lorastack.torch.passes import not_pickled
from lorastack.torch.places import Places, is_conv1d
from lorastack.torch.tensors import to_torch
from lorastack.torch.tokens import TokenPatch, token_patches
from lorastack.torch.wrappers import REPLACED, offloaded_to, tensor_at_hand


class _Hooked:
    """A patch whose hooks go along when the model is copied, until they are detached there."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise not_pickled()


class BiasPatch(_Hooked):
    """A trained bias in place of the base's: adds the difference to the module's output."""

    what = "trained biases of the base"

    def __init__(self, name: str, module: nn.Module, bias: torch.Tensor, own: torch.Tensor) -> None:
        self.claims = (f"bias {name}",)
        self.module = module
        self.difference = (bias.float() - own.detach().float()).to(own.dtype)
        self.channels = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.on = True
        self._handle: Any = None

    def attach(self) -> None:
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self._hook)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return output
        difference = self.difference
        if self.channels:
            difference = difference.view(-1, *[1] * len(module.kernel_size))
        return output + difference


def bring_back_replaced(model: nn.Module) -> None:
    """Put the base's own modules back where saved ones stand in a model, which may be a copy of the one attached to."""
    for parent in list(model.modules()):
        for key, module in parent._modules.items():
            if module is not None and REPLACED in module.__dict__:
                parent._modules[key] = module.__dict__[REPLACED]


class ModulePatch:
    """A whole module saved in place of the base's: a copy with the saved weights stands in its parent."""

    what = "whole saved modules"

    def __init__(
        self, path: str, parent: nn.Module, key: str, module: nn.Module, tensors: dict[str, torch.Tensor]
    ) -> None:
        self.claims = (path,)
        self.parent, self.key, self.module = parent, key, module
        self.copy = copy.copy(module)
        self.copy._parameters, self.copy._buffers = dict(module._parameters), dict(module._buffers)
        self.copy.__dict__[REPLACED] = module
        for name, tensor in tensors.items():
            if name in module._buffers:
                self.copy._buffers[name] = tensor
            else:
                self.copy._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self._on = True
        self._attached = False

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        self._on = value
        if self._attached:
            self.parent._modules[self.key] = self.copy if value else self.module

    def attach(self) -> None:
        self._attached = True
        self.on = self._on

    def detach(self) -> None:
        if self._attached:
            self.parent._modules[self.key] = self.module
            self._attached = False


class ShownPatch(_Hooked):
    """A trained bias in place of one that a module's own code reads: shown in its ``__dict__``, above the parameter."""

    what = "trained biases of the base"

    def __init__(self, name: str, module: nn.Module, tensor: torch.Tensor) -> None:
        self.claims = (f"bias {name}",)
        self.module, self.key, self.tensor = module, name.rpartition(".")[2], tensor
        self._on, self._attached = True, False

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        self._on = value
        if self._attached and value:
            self.module.__dict__[self.key] = self.tensor
        else:
            self.module.__dict__.pop(self.key, None)

    def attach(self) -> None:
        self._attached = True
        self.on = self._on

    def detach(self) -> None:
        self._attached = False
        self.module.__dict__.pop(self.key, None)


Patch = BiasPatch | ShownPatch | ModulePatch | TokenPatch


def clashes(name: str, patches: list[Patch], taken: dict[str, str], verb: str) -> list[str]:
    """A line for each adapter that replaces the same as those of ``name``, whose claims are added to ``taken``."""
    both: dict[str, list[str]] = {}
    for claim in [claim for patch in patches for claim in patch.claims]:
        if taken.setdefault(claim, name) != name:
            both.setdefault(taken[claim], []).append(claim)
    return [
        f"{other} and {name} both replace {', '.join(claims[:5])}"
        + (f" and {len(claims) - 5} more" if len(claims) > 5 else "")
        + f"; {verb} only one"
        for other, claims in both.items()
    ]


def make_patches(extras: Any, places: Places, problems: Problems) -> list[Patch]:
    """The patches of one adapter's extras; what finds no place is added to ``problems``."""
    patches: list[Patch] = []
    for name, factor in extras.get("bias", {}).items():
        path, _, parameter = name.rpartition(".")
        module = places.modules.get(path)
        own = None if module is None else tensor_at_hand(module, parameter)
        if module is None or own is None:
            problems.add(f"bias {name} is none of the model's")
        elif own.shape != factor.shape:
            problems.add(
                f"bias {name}: {type(module).__name__} has {list(own.shape)}, the adapter {list(factor.shape)}"
            )
        elif _adds_its_bias(module) and not (path and reads_weight(*places.parent_of(path))):
            patches.append(BiasPatch(name, module, to_torch(factor, torch.float32, own.device), own))
        else:
            patches.append(ShownPatch(name, module, to_torch(factor, own.dtype, own.device)))
    saved = {**extras.get("modules_to_save", {}), **resized_embeddings(extras, places, problems)}
    patches += _module_patches(saved, places, problems)
    return patches + token_patches(extras.get("new_tokens", {}), places, problems)


def _adds_its_bias(module: nn.Module) -> bool:
    """Whether a module's output is something with its bias added."""
    return isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)


def _module_patches(saved: dict[str, Factor], places: Places, problems: Problems) -> list[ModulePatch]:
    by_module: dict[str, dict[str, Factor]] = {}
    for name, factor in saved.items():
        path, _, parameter = name.rpartition(".")
        module = places.modules.get(path)
        own = None if module is None else _held(module).get(parameter)
        if own is None:
            problems.add(f"saved module weight {name} is none of the model's")
        elif own.shape != factor.shape:
            problems.add(f"saved module weight {name} is {list(factor.shape)}, the model's {list(own.shape)}")
        else:
            by_module.setdefault(path, {})[parameter] = factor
    patches = []
    for path, factors in by_module.items():
        module, (parent, key) = places.modules[path], places.parent_of(path)
        if offloaded_to(module) is not None:
            problems.add(f"saved module {path}: accelerate offloads the model's own, which cannot be replaced then")
            continue
        like = {name: _held(module)[name] for name in factors}
        tensors = {n: to_torch(f, like[n].dtype, like[n].device) for n, f in factors.items()}
        patches.append(ModulePatch(path, parent, key, module, tensors))
    return patches


def _held(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters and buffers: a norm of batches is saved with the means it has seen."""
    return {**module._parameters, **module._buffers}


def resized_embeddings(extras: Any, places: Places, problems: Problems) -> dict[str, Factor]:
    """The embeddings that PEFT saved along whose last rows are not the base's own: new tokens, which are the adapter's.

    Others are a changed base in disguise, and added to ``problems``.
    """
    found = {}
    for name, factor in extras.get("base_weight", {}).items():
        path, _, parameter = name.rpartition(".")
        module = places.modules.get(path)
        own = None if module is None else tensor_at_hand(module, parameter)
        if own is None:
            problems.add(f"saved base weight {name} is none of the model's")
            continue
        numbers = own.detach().float().cpu().numpy()
        if is_resized(factor.raw(), numbers):
            found[name] = factor
        elif not same_numbers(factor.raw(), numbers):
            problems.add(changed_base(name, factor.shape, tuple(own.shape)))
    return found
