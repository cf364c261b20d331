"""Updates of a bare parameter: experts kept in one 3-D tensor, or any weight that a module's own code uses.

There is no module whose output could be added to. While a stack is attached, the module finds a
`LoraWeight` under the parameter's name (in its ``__dict__``, which shadows the parameter and leaves the
parameter itself alone): a tensor that adds ``x A^T B^T`` to every product it takes part in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lorastack.errors import UnsupportedError
from lorastack.torch.passes import not_pickled
from lorastack.torch.places import Place
from lorastack.torch.prepared import Prepared, Slot
from lorastack.ways import Way, ways

#: Products by groups ask for rows of 16 bytes.
_PAD = 8


class LoraWeight(torch.Tensor):
    """A weight with low-rank updates that are never added to it.

    ``a [..., R, in]`` and ``b [..., out, R]`` have the base's leading (expert) axes; ``turned`` says that
    the base is ``[..., in, out]``.
    """

    base: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    turned: bool
    #: The layer that shows it, which learns that a pass computed with it.
    owner: Any

    @staticmethod
    def of(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, turned: bool, owner: Any) -> LoraWeight:
        weight: LoraWeight = torch.Tensor._make_subclass(LoraWeight, base.detach())
        weight.base, weight.a, weight.b, weight.turned, weight.owner = base, a, b, turned, owner
        return weight

    def __deepcopy__(self, memo: Any) -> LoraWeight:
        return self  # what a copy of the module is shown, until it is detached

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        rule = _RULES.get(name)
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, LoraWeight)).owner.reached = True
                return result
        if name in _HARMLESS:
            plain = [arg.base if isinstance(arg, LoraWeight) else arg for arg in args]
            return func(*plain, **kwargs)
        raise UnsupportedError(
            f"this model computes with its experts through {name}(), which updates are not known to pass through"
            + ways(Way("try model.set_experts_implementation('eager')", None))
        )


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    x, w = args[0], args[1]
    if not isinstance(w, LoraWeight) or w.turned or w.base.dim() != 2:
        return NotImplemented
    return func(x, w.base, *args[2:], **kwargs) + F.linear(F.linear(x, w.a), w.b)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    x, w = args
    if isinstance(w, LoraWeight) and w.turned:
        return func(x, w.base) + (x @ w.a.transpose(-1, -2)) @ w.b.transpose(-1, -2)
    if isinstance(x, LoraWeight) and not x.turned:
        return func(x.base, w) + x.b @ (x.a @ w)
    return NotImplemented


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    x, w = args[0], args[1]
    if not isinstance(w, LoraWeight) or not w.turned:
        return NotImplemented
    h = func(x, w.a.transpose(-1, -2), *args[2:], **kwargs)
    return func(x, w.base, *args[2:], **kwargs) + func(h, w.b.transpose(-1, -2), *args[2:], **kwargs)


def _pick(func: Any, args: Any, kwargs: Any) -> Any:
    w, index = args
    if isinstance(index, tuple) or w.base.dim() != 3:
        return NotImplemented
    return LoraWeight.of(w.base[index], w.a[index], w.b[index], w.turned, w.owner)


def _turn(func: Any, args: Any, kwargs: Any) -> Any:
    w, dims = args[0], args[1:]
    n = w.base.dim()
    if dims and {d % n for d in dims} != {n - 1, n - 2}:
        return NotImplemented
    return LoraWeight.of(w.base.transpose(-1, -2), w.a, w.b, not w.turned, w.owner)


def _rmatmul(func: Any, args: Any, kwargs: Any) -> Any:
    return _matmul(torch.matmul, args[::-1], kwargs)


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """``nn.MultiheadAttention`` hands its last projection over; with 1 in its place comes what it would project."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
             "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
    said = dict(zip(names, args, strict=False)) | kwargs
    w = said["out_proj_weight"]
    if not isinstance(w, LoraWeight) or w.turned or any(isinstance(said[n], LoraWeight) for n in names[:9]):
        return NotImplemented
    one = torch.eye(w.base.shape[1], dtype=w.base.dtype, device=w.base.device)
    bias, said["out_proj_weight"], said["out_proj_bias"] = said["out_proj_bias"], one, None
    inner, weights = func(*(said.pop(name) for name in names), *args[len(names) :], **said)
    return F.linear(inner, w.base, bias) + F.linear(F.linear(inner, w.a), w.b), weights


_RULES = {
    "multi_head_attention_forward": _attention,
    "linear": _linear, "matmul": _matmul, "__matmul__": _matmul, "__rmatmul__": _rmatmul,
    "bmm": _matmul, "mm": _matmul, "grouped_mm": _grouped, "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped, "transformers.grouped_mm_fallback": _grouped,
    "__getitem__": _pick, "transpose": _turn, "t": _turn,
}  # fmt: skip
#: What asks about a tensor without computing with it.
_HARMLESS = frozenset(
    "__get__ size dim data_ptr stride is_contiguous element_size numel is_floating_point storage_offset "
    "__len__ __repr__ get_device".split()
)


class LiveParameter:
    """The updates at one bare parameter; while attached, the module finds a `LoraWeight` in its place."""

    kind = "parameter"

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        self.place = place
        self.dtype = dtype
        self.slots: list[Slot] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rank = 0
        self.s = torch.empty(0)
        self.bias = None
        self.reached = False
        self._shown = False

    def add(self, entry: int, part: Prepared) -> None:
        """Put an adapter's factors behind the others'."""
        self._parts.append((part.a, part.b))
        self.rank += part.rank
        self.slots.append(Slot(entry, part.rank, part.scaling, None, None, part.finite))

    def remove(self, entry: int) -> None:
        kept = [n for n, slot in enumerate(self.slots) if slot.entry != entry]
        self._parts = [self._parts[n] for n in kept]
        self.slots = [self.slots[n]._replace(entry=self.slots[n].entry - (self.slots[n].entry > entry)) for n in kept]
        self.rank = sum(slot.rank for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors held."""
        return sum(t.numel() * t.element_size() for part in self._parts for t in part)

    def attach(self) -> None:
        self._shown = True
        self.refresh()

    attach_again = attach

    @property
    def attached(self) -> bool:
        """Whether the module is shown the updates."""
        return self._shown

    def state(self) -> dict[str, Any]:
        """What `restore` brings back."""
        return {**self.__dict__, "slots": list(self.slots), "_parts": list(self._parts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as `state` found it."""
        self.__dict__.clear()
        self.__dict__.update(state)

    @property
    def needs_refresh(self) -> bool:
        """Always: the scales are folded into what the module is shown."""
        return True

    def refresh(self) -> None:
        """Show the module the updates at their present scales."""
        if not self._shown or not self._parts:
            return
        weight = self.place.module._parameters[self.place.parameter]
        assert weight is not None
        start, folded = 0, []
        for (_, b), slot in zip(self._parts, self.slots, strict=True):
            folded.append(b * self.s[start : start + slot.rank])
            start += slot.rank
        a, b = torch.cat([part[0] for part in self._parts], -2), torch.cat(folded, -1)
        if pad := -self.rank % _PAD:
            a, b = F.pad(a, (0, 0, 0, pad)), F.pad(b, (0, pad))
        turned = tuple(weight.shape[-2:]) != (b.shape[-2], a.shape[-1])
        turned = turned or bool(getattr(self.place.module, "is_transposed", False))
        self.place.module.__dict__[self.place.parameter] = LoraWeight.of(weight, a, b, turned, self)

    def detach(self) -> None:
        self._shown = False
        self.place.module.__dict__.pop(self.place.parameter, None)
