"""ExpertsByRow: the experts of one module with each row's own mixture, where a row's tokens are still in order.

transformers hands its experts ``hidden_states [tokens, hidden]`` in the order of the rows, with ``top_k_index`` and
``top_k_weights``. Inside rows this computes what its own functions compute, tokens sorted by expert, and adds to both
products ``where(S != 0, (X A^T) * S, 0) B^T`` with the multipliers of each token's row. Outside rows the module's own
code runs. Classes whose experts are called in another way are refused by `refusal`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorastack.errors import UnsupportedError
from lorastack.torch.passes import CURRENT, Pass, not_pickled
from lorastack.torch.plan import rows_of_layer
from lorastack.torch.tiles import Layout

#: What transformers' ``use_experts_implementation`` says of a class of experts.
_SAYS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")


class Update:
    """The factors of all adapters at one parameter, ``a [experts, in, R]`` and ``b [experts, R, out]``."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, layout: Layout, owner: Any) -> None:
        self.a, self.b, self.layout, self.owner = a, b, layout, owner

    def add(self, running: Pass, x: torch.Tensor, y: torch.Tensor, offs: torch.Tensor, rows: Any) -> torch.Tensor:
        """``y`` plus each token's own sum; ``x`` and ``y`` sorted by expert, ``rows`` the row of each."""
        self.owner.reached = True
        tiles = running.mixture.tiles(self.layout)
        h = grouped(x.to(self.a.dtype), self.a, offs)
        h = torch.where(tiles.mask[rows], h * tiles.scales[rows], 0)
        return (y.to(h.dtype) + grouped(h, self.b, offs)).to(y.dtype)


class ExpertsByRow:
    """What stands for a module's ``forward`` while a stack is attached."""

    def __init__(self, module: nn.Module, number: int) -> None:
        self.module, self.number = module, number
        self.before = module.__dict__.get("forward")
        #: Parameter -> its updates, laid out when rows are first asked for; None until then.
        self.updates: dict[str, Update | None] = {}
        module.__dict__["forward"] = self

    def __deepcopy__(self, memo: Any) -> ExpertsByRow:
        return self  # what a copy of the module has, until it is detached

    def __reduce__(self) -> Any:
        raise not_pickled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = CURRENT.running
        if running is None or running.number != self.number or running.mixture is None:
            before = self.before
            return (
                type(self.module).forward(self.module, *args, **kwargs) if before is None else before(*args, **kwargs)
            )
        return self._by_row(running, *args, **kwargs)

    def take_off(self) -> None:
        """Give the module its own ``forward`` back."""
        if self.module.__dict__.get("forward") is self:
            if self.before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.before

    def _by_row(
        self, running: Pass, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        module: Any = self.module
        if getattr(module, "_is_expert_parallel", False):
            raise UnsupportedError("experts that are spread over processes cannot be mixed by row")
        tokens, top = top_k_index.shape
        rows = self._row_of_each(running, hidden_states)
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        picked = order // top
        every = torch.arange(module._parameters["down_proj"].shape[0], device=experts.device)
        offs = torch.searchsorted(experts, every, right=True).to(torch.int32)
        rows, x = rows[picked], hidden_states[picked]
        up = self._product(running, "gate_up_proj" if module.has_gate else "up_proj", x, offs, rows, experts)
        h = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        y = self._product(running, "down_proj", h, offs, rows, experts)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].view(tokens, top, -1).sum(1).to(hidden_states.dtype)

    def _product(
        self, running: Pass, name: str, x: torch.Tensor, offs: torch.Tensor, rows: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        module: Any = self.module
        weight = module._parameters[name]
        y = grouped(x, weight if module.is_transposed else weight.mT, offs)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias")[experts]
        update = self.updates.get(name)
        return y if update is None else update.add(running, x, y, offs, rows)

    def _row_of_each(self, running: Pass, x: torch.Tensor) -> torch.Tensor:
        mixture = running.mixture
        index: torch.Tensor | None = mixture.index_on(running, len(x), x.device)
        if index is not None:
            return index
        rows_of_layer(x, running.rows, "experts")
        each = torch.arange(mixture.rows, device=x.device)
        return each.repeat_interleave(len(x) // mixture.rows)


def grouped(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """``x [tokens, in]``, of which those up to ``offs[n]`` meet ``weights[n] [in, out]``."""
    function = getattr(F, "grouped_mm", None)
    if function is not None and x.is_cuda and x.dtype == torch.bfloat16:
        made: torch.Tensor = function(x, weights, offs=offs)
        return made
    start, parts = 0, []
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            parts.append(x[start:stop] @ weights[expert])
        start = stop
    return torch.cat(parts) if parts else x.new_zeros((0, weights.shape[-1]))


def refusal(module: nn.Module, parameter: str) -> str | None:
    """Why the rows of this parameter's tokens cannot be told; None where transformers hands them over in order."""
    function = getattr(type(module).forward, "__wrapped__", None)
    if function is None or any(not hasattr(module, name) for name in _SAYS):
        return (
            f"it changes {parameter} of {type(module).__name__}, whose code is not known to keep tokens in the order "
            "of the rows"
        )
    if parameter not in ("gate_up_proj", "up_proj", "down_proj") or getattr(module, parameter).dim() != 3:
        return f"it changes {parameter} of {type(module).__name__}, which rows are not known to pass through"
    return None
