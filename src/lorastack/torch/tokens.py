"""TokenPatch: trained rows of some tokens, in every module whose weight is the tensor that they are rows of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorastack.core.factor import Factor
from lorastack.errors import Problems
from lorastack.torch.passes import not_pickled
from lorastack.torch.places import Places
from lorastack.torch.tensors import as_looked_up, to_torch


class TokenPatch:
    """Trained rows of some tokens in place of a weight's: of embeddings, and of heads, that share it.

    Rows of different tokens go together, of the same tokens they do not: each is a claim of its own.
    """

    what = "trained tokens"

    def __init__(self, name: str, modules: list[Any], ids: tuple[int, ...], rows: torch.Tensor) -> None:
        self.claims = tuple(f"token {token} of {name}" for token in ids)
        self.modules = modules
        self.ids = torch.tensor(ids, device=rows.device)
        self.rows = rows
        self.where = torch.full((len(modules[0].weight),), -1, dtype=torch.long, device=rows.device)
        self.where[self.ids] = torch.arange(len(ids), device=rows.device)
        self.on = True
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # hooks that go along when the model is copied, until they are detached there

    def __reduce__(self) -> Any:
        raise not_pickled()

    def attach(self) -> None:
        """Set the hooks."""
        if self._handles:
            return
        for module in self.modules:
            hook = self._look_up if isinstance(module, nn.Embedding) else self._project
            # Before the hooks of updates, which are added to the trained rows too, as in PEFT's forward pass.
            self._handles.append(module.register_forward_hook(hook, prepend=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _look_up(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return output
        where = self.where[args[0]]
        rows = as_looked_up(module, self.rows[where.clamp_min(0)])
        return torch.where((where >= 0)[..., None], rows, output)

    def _project(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return output
        bias = None if module.bias is None else module.bias[self.ids]
        return output.index_copy(output.dim() - 1, self.ids, F.linear(args[0], self.rows, bias).to(output.dtype))


def token_patches(new_tokens: dict[str, tuple[tuple[int, ...], Factor]], places: Places, problems: Problems) -> Any:
    """The patches of an adapter's trained tokens; what finds no place is added to ``problems``."""
    patches = []
    named = {name.removesuffix(".weight") for name in new_tokens}
    for name, (ids, factor) in new_tokens.items():
        module: Any = places.modules.get(name.removesuffix(".weight"))
        weight = module._parameters.get("weight") if isinstance(module, (nn.Embedding, nn.Linear)) else None
        if weight is None or weight.shape[-1] != factor.shape[-1]:
            problems.add(f"token rows of {name}: the model has no embedding of width {factor.shape[-1]} there")
        elif ids and max(ids) >= len(weight):
            problems.add(f"token rows of {name}: token {max(ids)} is outside the vocabulary of {len(weight)}")
        else:
            rows = to_torch(factor, weight.dtype, weight.device)
            patches.append(TokenPatch(name, _with_weight(places, module, named), ids, rows))
    return patches


def _with_weight(places: Places, first: nn.Module, named: set[str]) -> list[nn.Module]:
    """Every embedding and linear layer with this one's weight, but those that have rows of their own, as PEFT does."""
    found = {id(first): first}
    for path, module in places.modules.items():
        shares = isinstance(module, (nn.Embedding, nn.Linear)) and module._parameters.get("weight") is first.weight
        if shares and path not in named:
            found[id(module)] = module
    return list(found.values())
