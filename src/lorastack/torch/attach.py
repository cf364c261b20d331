"""Attach a stack to a live model, without touching its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn

from lorastack.core.adapter import LoadedLora, LoraAdapter
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError
from lorastack.torch.entry import Entry
from lorastack.torch.experts_by_row import ExpertsByRow
from lorastack.torch.handle import ATTACHED, Handle
from lorastack.torch.layer import LiveLayer
from lorastack.torch.parts import as_module, roots_of
from lorastack.torch.saved import BiasPatch, bring_back_replaced
from lorastack.torch.tokens import TokenPatch
from lorastack.torch.weight import LoraWeight
from lorastack.torch.wrappers import modules_of


def attach(
    model: Any,
    stack: LoraStack | LoadedLora,
    *,
    dtype: torch.dtype | None = None,
    allow_partial: bool = False,
) -> Handle:
    """Add the stack's sum to the outputs of a model's layers, from the next forward pass on.

    Works on any ``torch.nn.Module``, above all on ``transformers`` models: linear layers (quantised ones
    of any library too, since only inputs and outputs are used), GPT-2's Conv1D, embeddings, convolutions
    and experts kept as one parameter. Of a ``diffusers`` pipeline every model that the
    adapters name gets what is its own: ``unet.``, ``transformer.``, ``text_encoder_2.``, ... are fronts of their
    weights' names. Adapters with GGUF names are converted with the model's own
    configuration. The weights are not touched, and detaching leaves no trace.

    Parameters
    ----------
    model
        The model whose weight names the adapters were trained with, or a pipeline that holds it in its ``components``.
    stack
        Both of its lists are attached; the handle keeps a copy. A single adapter is taken at scale 1. An empty stack
        changes nothing until something is pushed to the handle.
    dtype
        Type to compute in; each layer's own when not given.
    allow_partial
        Leave out what finds no module, and say so in ``handle.report``, instead of raising.

    Raises
    ------
    UnsupportedError
        Listing every weight without a module, every shape that does not fit, everything that cannot be
        honoured. The model is unchanged then.
    ArgumentError
        When the model has a stack already.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from lorastack import LoadedLora, LoraStack
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> _ = torch.nn.init.ones_(model[0].weight)
    >>> lora = LoadedLora.from_tensors({"0.weight": (np.ones((1, 3)), np.ones((2, 1)))}, name="ones")
    >>> x = torch.ones(3)
    >>> base = model(x)
    >>> with attach(model, LoraStack([(lora, 0.5)])) as handle:
    ...     changed = model(x)
    ...     handle.set_scale("ones", 0.0)
    ...     back = model(x)
    >>> (changed - base).tolist(), bool((back == base).all()), torch.equal(model(x), base)
    ([1.5, 1.5], True, True)
    """
    if isinstance(stack, LoadedLora):
        stack = LoraStack([(stack, 1.0)])
    entries = [*stack.entries, *((adapter, 1.0) for adapter in stack.adapters)]
    return attach_all(model, entries, dtype=dtype, allow_partial=allow_partial)


def attach_all(
    model: Any,
    entries: Sequence[tuple[LoadedLora | LoraAdapter, float]],
    *,
    dtype: torch.dtype | None = None,
    allow_partial: bool = False,
) -> Handle:
    """As `attach`, for adapters of any naming side by side: each is converted to the model's own names."""
    model = as_module(model)
    refuse_attached(model)
    handle = Handle(model, dtype, allow_partial)
    handle._assembly.owner = handle
    try:
        handle._assembly.add(entries)
        for root in roots_of(model):
            ATTACHED[root] = ref(handle)
        return handle
    except BaseException:
        handle._assembly.clear()
        for root in roots_of(model):
            ATTACHED.pop(root, None)
        raise


def refuse_attached(model: nn.Module) -> None:
    """ArgumentError when the model, a part of it, or what it is a copy of has a stack."""
    with_a_stack = set(map(id, ATTACHED))
    for module in modules_of(model):
        hooks = module._forward_hooks
        if id(module) in with_a_stack or (hooks and any(map(_is_ours, hooks.values()))):
            raise ArgumentError(
                f"{type(module).__name__} has a stack attached already, or is a copy or a part of one that has; "
                "change it through its handle, or detach it"
            )


def detach(model: Any) -> None:
    """Take off whatever stack a model has, also one that came along when an attached model was copied.

    A handle detaches what it attached; this is for a model whose handle is not at hand.
    """
    model = as_module(model)
    for root in roots_of(model):
        known = ATTACHED.get(root)
        handle = known() if known is not None else None
        if handle is not None:
            handle.detach()
        ATTACHED.pop(root, None)
    bring_back_replaced(model)
    for module in modules_of(model):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                for every in (
                    hooks,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    every.pop(key, None)
        for name in [name for name, value in module.__dict__.items() if isinstance(value, LoraWeight)]:
            del module.__dict__[name]
        there = module.__dict__.get("forward")
        if isinstance(there, ExpertsByRow):
            if there.module is module:
                there.take_off()
            else:  # a copy has what it is a copy of
                del module.__dict__["forward"]


def _is_ours(hook: object) -> bool:
    inner = getattr(hook, "__self__", None) or getattr(getattr(hook, "__wrapped__", None), "__self__", None)
    inner = inner or getattr(getattr(hook, "_torchdynamo_orig_callable", None), "__self__", None)
    return isinstance(inner, (LiveLayer, Entry, BiasPatch, TokenPatch))
