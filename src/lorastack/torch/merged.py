"""A stack merged into the weights of a live model, with a way back: the original weights are kept, to the bit.

A merged layer costs nothing more in a forward pass. Its weights are rounded to their type, where an attached stack adds
to the outputs exactly; so this is for a mixture that stays for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorastack.base.model import IN_GROUPS
from lorastack.core.adapter import LoadedLora
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, Problems, UnsupportedError
from lorastack.torch.attach import refuse_attached
from lorastack.torch.parts import as_module, roots_of
from lorastack.torch.places import Place, Places, is_conv1d
from lorastack.torch.prepare import Candidate, prepare
from lorastack.torch.prepared import Prepared
from lorastack.torch.saved import BiasPatch, ModulePatch, Patch, ShownPatch, clashes
from lorastack.torch.tokens import TokenPatch
from lorastack.ways import Way, ways

#: Numbers of a block: of a large weight no second copy is made in float32.
_BLOCK = 1 << 22
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ATTACH = Way("attach the stack instead", None)
#: What was merged into a model, the last one at the end: taken back in the other order only.
_MERGED: WeakKeyDictionary[nn.Module, list[MergedStack]] = WeakKeyDictionary()


class _Kept(NamedTuple):
    """A parameter that was changed: where it is, what it was, and its numbers where those were written over."""

    module: nn.Module
    name: str
    parameter: nn.Parameter | None
    numbers: torch.Tensor | None
    buffer: torch.Tensor | None = None


class MergedStack:
    """What `merge_into` did to a model. Also a context manager that takes it back at its end."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.model, self.names = model, names
        self._kept: list[_Kept] = []
        self.merged = True

    def __repr__(self) -> str:
        state = "" if self.merged else ", taken back"
        return f"MergedStack({type(self.model).__name__}, {len(self._kept)} weights of {', '.join(self.names)}{state})"

    @property
    def nbytes(self) -> int:
        """Bytes of the original weights that are kept."""
        return sum(k.numbers.numel() * k.numbers.element_size() for k in self._kept if k.numbers is not None)

    def undo(self) -> None:
        """Give the model its original weights, to the bit. A second call does nothing.

        Raises
        ------
        ArgumentError
            When another stack was merged into the model since, or is attached to it.
        """
        if not self.merged:
            return
        refuse_attached(self.model)
        every = [_MERGED[root] for root in roots_of(self.model) if root in _MERGED]
        later = next((one[-1] for one in every if one and one[-1] is not self), None)
        if later is not None:
            raise ArgumentError(f"{later!r} was merged later; take that back first")
        self._bring_back()
        self.merged = False
        for one in every:
            one.pop()

    def _bring_back(self) -> None:
        with torch.no_grad():
            for module, name, parameter, numbers, buffer in reversed(self._kept):
                if buffer is not None:
                    module._buffers[name] = buffer
                    continue
                if parameter is not None and numbers is not None:
                    parameter.copy_(numbers)
                module._parameters[name] = parameter
        self._kept = []

    def __enter__(self) -> MergedStack:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def _keep(self, module: nn.Module, name: str, on_cpu: bool) -> None:
        """Keep a parameter's numbers before they are written over."""
        parameter = module._parameters[name]
        assert parameter is not None
        old = parameter.detach()
        self._kept.append(_Kept(module, name, parameter, old.to("cpu", copy=True) if on_cpu else old.clone()))

    def _put(self, module: nn.Module, name: str, new: nn.Parameter) -> None:
        """Give a module a parameter of its own in place of the one it has, which others may share."""
        self._kept.append(_Kept(module, name, module._parameters.get(name), None))
        module._parameters[name] = new


def merge_into(
    model: Any, stack: LoraStack | LoadedLora, *, keep_on_cpu: bool = False, exact: bool = False
) -> MergedStack:
    """Add a stack's updates to the weights of a live model; `MergedStack.undo` takes them back, to the bit.

    Parameters
    ----------
    model
        The model whose weight names the adapters were trained with, or a pipeline of such; its weights are
        float32, float16 or bfloat16.
    stack
        Both of its lists, or a single adapter at scale 1.
    keep_on_cpu
        Keep the original weights in the CPU's memory, rather than where they are.
    exact
        Sum in float64, not float32.

    Raises
    ------
    UnsupportedError
        Listing everything that does not fit, or cannot be written into the model's weights. It is unchanged then.
    ArgumentError
        When a stack is attached to the model, or a part of it.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from lorastack import LoadedLora
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> lora = LoadedLora.from_tensors({"0.weight": (np.ones((1, 3)), np.ones((2, 1)))})
    >>> before = model[0].weight.clone()
    >>> with merge_into(model, lora):
    ...     (model[0].weight - before).mean().item()
    1.0
    >>> torch.equal(model[0].weight, before)
    True
    """
    model = as_module(model)
    refuse_attached(model)
    stack = LoraStack([(stack, 1.0)]) if isinstance(stack, LoadedLora) else stack
    places, wide = Places(model), torch.float64 if exact else torch.float32
    candidates: list[Candidate] = []
    for adapter, scale in (*stack.entries, *((adapter, 1.0) for adapter in stack.adapters)):
        candidates.append(Candidate.of(adapter, scale, [one.name for one in candidates]))
    parts, patches = _prepared(candidates, places, wide)
    _check(parts, patches, places)
    done = MergedStack(model, tuple(candidate.name for candidate in candidates))
    try:
        with torch.no_grad():
            _merge(done, parts, patches, places, wide, keep_on_cpu)
    except BaseException:
        done._bring_back()
        raise
    for root in roots_of(model):
        _MERGED.setdefault(root, []).append(done)
    return done


_Parts = dict[str, list[tuple[float, Prepared]]]


def _prepared(candidates: Sequence[Candidate], places: Places, wide: torch.dtype) -> tuple[_Parts, list[Patch]]:
    """Weight -> (scale, update) in the order of the stack; and what replaces something, of adapters that act."""
    parts: _Parts = {}
    patches: list[Patch] = []
    owners: dict[str, str] = {}
    problems = Problems("the stack cannot be merged into the model")
    for candidate in candidates:
        try:
            own, replaced, _ = prepare(candidate, places, wide, allow_partial=False)
        except UnsupportedError as error:
            problems.add(error)
            continue
        if candidate.scale == 0:
            continue
        if any(part.tokens for part in own):
            problems.add(
                f"{candidate.name}: it acts from its invocation tokens on only, not in every token{ways(_ATTACH)}"
            )
        for part in own:
            parts.setdefault(part.place.name, []).append((candidate.scale, part))
        for line in clashes(candidate.name, replaced, owners, "merge"):
            problems.add(line)
        patches += replaced
    problems.raise_any(UnsupportedError)
    return parts, patches


def _check(parts: _Parts, patches: Sequence[Patch], places: Places) -> None:
    """Refuse weights that are not numbers at hand: packed ones, and those that accelerate keeps elsewhere."""
    problems = Problems("the stack cannot be merged into the model")
    for name, at in parts.items():
        place = at[0][1].place
        if getattr(place.module, "groups", 1) != 1:
            problems.add(f"weight {name} {IN_GROUPS}{ways(_ATTACH)}")
        weight = place.module._parameters.get(place.parameter)
        if weight is None or weight.dtype not in _FLOATS or weight.device.type == "meta":
            problems.add(f"weight {name} is packed, or kept elsewhere, and cannot be written to{ways(_ATTACH)}")
    problems.raise_any(UnsupportedError)


def _merge(
    done: MergedStack, parts: _Parts, patches: Sequence[Patch], places: Places, wide: torch.dtype, on_cpu: bool
) -> None:
    for patch in patches:
        if isinstance(patch, ModulePatch):
            for name, parameter in patch.copy._parameters.items():
                if parameter is not None and parameter is not patch.module._parameters.get(name):
                    done._put(patch.module, name, parameter)
            for name, buffer in patch.copy._buffers.items():
                if (own := patch.module._buffers.get(name)) is not None and own is not buffer:
                    done._kept.append(_Kept(patch.module, name, None, None, own))
                    patch.module._buffers[name] = buffer
        elif isinstance(patch, TokenPatch):  # updates are added to the trained rows too
            _put_tokens(done, patch, places, on_cpu)
    shared = _shared(places)
    for at in parts.values():
        place = at[0][1].place
        _own(done, place.module, place.parameter, shared, on_cpu)
        weight = place.module._parameters[place.parameter]
        assert weight is not None
        _add(weight, at, place, wide)
        biases = [(scale * part.scaling, part.bias) for scale, part in at if part.bias is not None]
        if biases:
            _add_biases(done, place.module, biases, weight, on_cpu)
    for patch in patches:
        if isinstance(patch, BiasPatch):
            _own(done, patch.module, "bias", shared, on_cpu)
            bias = patch.module._parameters["bias"]
            assert bias is not None
            bias.copy_((bias.to(wide) + patch.difference.to(wide)).to(bias.dtype))
        elif isinstance(patch, ShownPatch):
            _own(done, patch.module, patch.key, shared, on_cpu)
            own = patch.module._parameters[patch.key]
            assert own is not None
            own.copy_(patch.tensor)


def _shared(places: Places) -> set[int]:
    """Parameters that several modules have."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in {id(module): module for module in places.modules.values()}.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _own(done: MergedStack, module: nn.Module, name: str, shared: set[int], on_cpu: bool) -> None:
    """Make sure that writing to a parameter changes this module alone, and can be taken back."""
    parameter = module._parameters[name]
    if parameter is not None and id(parameter) in shared:
        done._put(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    else:
        done._keep(module, name, on_cpu)


def _add(weight: torch.Tensor, at: Sequence[tuple[float, Prepared]], place: Place, wide: torch.dtype) -> None:
    """Write the merged numbers over a weight, block by block."""
    matrices = weight if place.kind == "parameter" and weight.dim() == 3 else weight.detach()[None]
    for n, matrix in enumerate(matrices):
        flat = matrix.view(matrix.shape[0], -1) if matrix.is_contiguous() else matrix
        turned = _turned(place, at[0][1])
        for rows in _blocks(flat):
            new = flat[rows].to(wide)
            for scale, part in at:
                a, b = (_matrix(factor, place.kind, n).to(wide) for factor in (part.a, part.b))
                delta = (a[:, rows].t() @ b.t()) if turned else b[rows] @ a
                if part.dora is None:
                    new += (scale * part.scaling) * delta
                    continue
                ratio = part.dora.ratio.reshape(-1).to(wide)
                ratio = ratio[None] if turned else ratio[rows, None]
                new = new * (1 + scale * (ratio - 1)) + scale * part.scaling * ratio * delta
            flat[rows] = new.to(weight.dtype)


def _turned(place: Place, part: Prepared) -> bool:
    """Whether the weight is kept [in, out]."""
    if place.kind == "parameter":
        return place.turned(part.b.shape[-2], part.a.shape[-1])
    return place.kind == "embedding" or is_conv1d(place.module)


def _blocks(flat: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(flat.shape[1], 1))
    for first in range(0, flat.shape[0], step):
        yield slice(first, first + step)


def _matrix(factor: torch.Tensor, kind: str, n: int) -> torch.Tensor:
    """One matrix of a factor: an expert's, or a kernel's positions side by side."""
    if kind == "conv":
        return factor.reshape(factor.shape[0], -1)
    return factor[n] if factor.dim() == 3 else factor


def _add_biases(
    done: MergedStack, module: nn.Module, biases: Sequence[tuple[float, torch.Tensor]], like: torch.Tensor, on_cpu: bool
) -> None:
    """Add biases of lora_B to a layer's own; one that has none gets one."""
    total = sum((times * bias for times, bias in biases[1:]), biases[0][0] * biases[0][1]).reshape(-1)
    own = module._parameters.get("bias")
    if own is None:
        done._put(module, "bias", nn.Parameter(total.to(like.dtype), requires_grad=False))
        return
    done._keep(module, "bias", on_cpu)
    own.copy_((own.to(total.dtype) + total).to(own.dtype))


def _put_tokens(done: MergedStack, patch: TokenPatch, places: Places, on_cpu: bool) -> None:
    """Write trained rows into every module that has them; one that shares its weight with others gets its own."""
    weight = patch.modules[0]._parameters["weight"]
    others = [m for m in places.modules.values() if m._parameters.get("weight") is weight and m not in patch.modules]
    if others:
        new = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for module in patch.modules:
            done._put(module, "weight", new)
        weight = new
    elif not any(k.parameter is weight and k.numbers is not None for k in done._kept):
        done._keep(patch.modules[0], "weight", on_cpu)
    weight[patch.ids] = patch.rows.to(weight.dtype)
