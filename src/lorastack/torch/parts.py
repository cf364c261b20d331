"""Parts: a pipeline of several models as one module, whose children are its models; diffusers is not imported.

A pipeline's call is no module's: a forward pass begins at each of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorastack.errors import ArgumentError
from lorastack.torch.wrappers import unwrapped


class Parts(nn.Module):
    """The models of a pipeline, by the pipeline's own names: unet, text_encoder, vae, ...; made by `as_module`."""

    pipeline: Any

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.refresh()

    def refresh(self) -> None:
        """See which models the pipeline has now: one may have been compiled, or replaced."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                self._modules[name] = part
            else:
                self._modules.pop(name, None)

    @property
    def names(self) -> tuple[str, ...]:
        """What the pipeline calls its models."""
        return tuple(self._modules)


def as_module(model: Any) -> nn.Module:
    """What a stack is attached to: a model without what wraps it, or the parts of a pipeline.

    Raises
    ------
    ArgumentError
        When it is neither.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model)
    if isinstance(getattr(model, "components", None), Mapping):
        # Named as the pipeline's class is: messages say what the model is by its class.
        named: type[Parts] = type(type(model).__name__, (Parts,), {})
        made = named(model)
        if made.names:
            return made
    raise ArgumentError(
        f"{type(model).__name__} is no torch.nn.Module, and no pipeline with models in its .components; give one of "
        "these"
    )


def roots_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are called: the model itself, or each part of a pipeline."""
    if not isinstance(model, Parts):
        return [model]
    return list({id(part): part for part in map(unwrapped, model.children())}.values())
