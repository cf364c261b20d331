"""LoraWeight: a weight ``W + L R`` whose sum is never formed: what is linear in W is computed of W, and of L and R.

What is not known to be linear in a weight is refused by its name; nothing drops an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lorastack.errors import UnsupportedError
from lorastack.torch.passes import not_pickled
from lorastack.ways import Way, ways


class LoraWeight(torch.Tensor):
    """A weight with low-rank updates that are never added to it.

    ``base [..., rows, columns]`` as the model keeps it, ``left [..., rows, R]``, ``right [..., R, columns]``.
    """

    base: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    #: The layer that shows it, which learns that a pass computed with it.
    owner: Any

    @staticmethod
    def of(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, owner: Any) -> LoraWeight:
        weight: LoraWeight = torch.Tensor._make_subclass(LoraWeight, base.detach())
        weight.base, weight.left, weight.right, weight.owner = base, left, right, owner
        return weight

    def mapped(self, base: Callable[[torch.Tensor], torch.Tensor], left: Any = None, right: Any = None) -> LoraWeight:
        """The same with ``base`` done to the weight, and to each factor the same or what stands for it."""
        return LoraWeight.of(base(self.base), (left or base)(self.left), (right or base)(self.right), self.owner)

    def __deepcopy__(self, memo: Any) -> LoraWeight:
        return self  # what a copy of the module is shown, until it is detached

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise not_pickled()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property, which has the name
            name = f".{func.__self__.__name__}"
        rule = _RULES.get(name)
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                for arg in _all(args, kwargs):
                    if isinstance(arg, LoraWeight):
                        arg.owner.reached = True
                return result
        if name in _HARMLESS:
            plain = [arg.base if isinstance(arg, LoraWeight) else arg for arg in args]
            return func(*plain, **kwargs)
        raise UnsupportedError(
            f"this model computes with its experts through {name}(), which updates are not known to pass through"
            + ways(Way("try model.set_experts_implementation('eager')", None))
        )


def _all(args: Any, kwargs: Any) -> list[Any]:
    flat = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [*flat, *kwargs.values()]


def _only(args: Sequence[Any], at: int) -> LoraWeight | None:
    """The argument at that place, if it is a `LoraWeight` and no other is one."""
    weight = args[at] if at < len(args) else None
    alone = isinstance(weight, LoraWeight) and sum(isinstance(arg, LoraWeight) for arg in args) == 1
    return weight if alone else None


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    w = _only(args, 1)
    if w is None or w.base.dim() != 2:
        return NotImplemented
    return func(args[0], w.base, *args[2:], **kwargs) + F.linear(F.linear(args[0], w.right), w.left)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    if (w := _only(args, 1)) is not None:
        return func(args[0], w.base) + (args[0] @ w.left) @ w.right
    if (w := _only(args, 0)) is not None:
        return func(w.base, args[1]) + w.left @ (w.right @ args[1])
    return NotImplemented


def _rmatmul(func: Any, args: Any, kwargs: Any) -> Any:
    return _matmul(torch.matmul, args[::-1], kwargs)


def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    w = _only(args, 2)
    if w is None:
        return NotImplemented
    added = kwargs.get("alpha", 1) * ((args[1] @ w.left) @ w.right)
    return func(args[0], args[1], w.base, **kwargs) + added


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    w = _only(args, 1)
    if w is None:
        return NotImplemented
    h = func(args[0], w.left, *args[2:], **kwargs)
    return func(args[0], w.base, *args[2:], **kwargs) + func(h, w.right, *args[2:], **kwargs)


def _einsum(func: Any, args: Any, kwargs: Any) -> Any:
    """A sum over products has the weight once in each, so the product of its factors stands for it."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    at = [n for n, one in enumerate(operands) if isinstance(one, LoraWeight)]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(at) != 1 or not arrow or len(names[at[0]]) != operands[at[0]].base.dim() or "..." in names[at[0]]:
        return NotImplemented
    (n,) = at
    w, own = operands[n], names[n]
    rank = next(letter for letter in "zyxwvutsrqponmlkjihgfedcba" if letter not in equation)
    parts = [*names[:n], own[:-1] + rank, own[:-2] + rank + own[-1], *names[n + 1 :]]
    whole = [*operands[:n], w.base, *operands[n + 1 :]]
    split = [*operands[:n], w.left, w.right, *operands[n + 1 :]]
    return func(equation, *whole) + func(f"{','.join(parts)}->{output}", *split)


def _embedding(func: Any, args: Any, kwargs: Any) -> Any:
    w = _only(args, 1)
    if w is None or len(args) > 3 or any(kwargs.get(key) for key in ("max_norm", "sparse")):
        return NotImplemented
    return func(args[0], w.base, *args[2:], **kwargs) + w.left[args[0]] @ w.right


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """``nn.MultiheadAttention`` hands its projections over; with 1 in their place comes what they would project."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
             "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
    said = dict(zip(names, args, strict=False)) | kwargs
    out, into = said["out_proj_weight"], said["in_proj_weight"]
    apart = [f"{one}_proj_weight" for one in "qkv"] if said.get("use_separate_proj_weight") else []
    if any(isinstance(value, LoraWeight) for name, value in said.items() if not name.endswith("_proj_weight")):
        return NotImplemented
    biases = (None,) * 3 if said["in_proj_bias"] is None else said["in_proj_bias"].chunk(3)
    width = said["embed_dim_to_check"]
    if apart and any(isinstance(said[name], LoraWeight) for name in apart):
        for name, weight, bias in zip(("query", "key", "value"), apart, biases, strict=True):
            w = said[weight]
            said[name] = F.linear(said[name], w, bias)
            said[weight] = torch.eye(width, dtype=w.dtype, device=w.device)
        said["in_proj_bias"] = None
    elif isinstance(into, LoraWeight):
        for name, part, bias in zip(("query", "key", "value"), into.chunk(3), biases, strict=True):
            said[name] = F.linear(said[name], part, bias)
        said["in_proj_weight"] = torch.eye(width, dtype=into.dtype, device=into.device).repeat(3, 1)
        said["in_proj_bias"] = None
    bias = said["out_proj_bias"]
    if isinstance(out, LoraWeight):
        said["out_proj_weight"] = torch.eye(out.base.shape[1], dtype=out.base.dtype, device=out.base.device)
        said["out_proj_bias"] = None
    inner, weights = func(*(said.pop(name) for name in names), *args[len(names) :], **said)
    return F.linear(inner, out, bias) if isinstance(out, LoraWeight) else inner, weights


def _pick(func: Any, args: Any, kwargs: Any) -> Any:
    """Experts, rows or columns out of a weight: an index of tensors in front, whole numbers and slices elsewhere."""
    w, given = args
    if not isinstance(w, LoraWeight):
        return NotImplemented
    index, dims = given if isinstance(given, tuple) else (given,), w.base.dim()
    if any(one is None for one in index) or sum(one is ... for one in index) > 1:
        return NotImplemented
    if any(one is ... for one in index):
        at = next(n for n, one in enumerate(index) if one is ...)
        index = (*index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :])
    index += (slice(None),) * (dims - len(index))
    front, (rows, columns) = index[:-2], index[-2:]
    if not (isinstance(rows, slice) and isinstance(columns, slice)):
        return NotImplemented
    whole = slice(None)
    return w.mapped(lambda t: t[given], lambda t: t[(*front, rows, whole)], lambda t: t[(*front, whole, columns)])


def _narrow(w: LoraWeight, dim: int, start: int, length: int) -> LoraWeight:
    dim %= w.base.dim()

    def part(t: torch.Tensor) -> torch.Tensor:
        return t.narrow(dim, start, length)

    def same(t: torch.Tensor) -> torch.Tensor:
        return t

    last = w.base.dim() - 1
    return w.mapped(part, same if dim == last else part, same if dim == last - 1 else part)


def _chunk(func: Any, args: Any, kwargs: Any) -> Any:
    """``chunk`` and ``split``: the pieces are those of the base."""
    w = _only(args, 0)
    if w is None:
        return NotImplemented
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    pieces, start = [], 0
    for piece in func(w.base, *args[1:], **kwargs):
        pieces.append(_narrow(w, dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return tuple(pieces)


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Matrices one below the other, or side by side: each has its own ranks."""
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0) % 2
    if any(part.dim() != 2 for part in parts) or set(kwargs) - {"dim"}:
        return NotImplemented
    owner = next(part.owner for part in parts if isinstance(part, LoraWeight))
    bases = [part.base if isinstance(part, LoraWeight) else part for part in parts]
    lefts = [part.left if isinstance(part, LoraWeight) else part.new_zeros(len(part), 0) for part in parts]
    rights = [part.right if isinstance(part, LoraWeight) else part.new_zeros(0, part.shape[1]) for part in parts]
    diagonal: Any = torch.block_diag
    left, right = (diagonal(*lefts), func(rights, 0)) if dim == 0 else (func(lefts, 1), diagonal(*rights))
    return LoraWeight.of(func(bases, dim), left, right, owner)


def _turn(func: Any, args: Any, kwargs: Any) -> Any:
    w, dims = args[0], args[1:]
    n = w.base.dim()
    if kwargs or (dims and {d % n for d in dims} != {n - 1, n - 2}):
        return NotImplemented
    return LoraWeight.of(w.base.mT, w.right.mT, w.left.mT, w.owner)


def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    w, dims = args[0], args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    n = w.base.dim()
    whole = [d % n for d in dims]
    if whole[:-2] != list(range(n - 2)):
        return NotImplemented
    return w if whole[-2] < whole[-1] else _turn(func, (w,), {})


def _transpose_of_two(func: Any, args: Any, kwargs: Any) -> Any:
    return _turn(func, args, kwargs) if args[0].base.dim() == 2 else NotImplemented


def _retyped(func: Any, args: Any, kwargs: Any) -> Any:
    """Another type, another device or another copy, of all parts alike."""
    w = _only(args, 0)
    return NotImplemented if w is None else w.mapped(lambda t: func(t, *args[1:], **kwargs))


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """A matrix of all experts' rows as one matrix for each of them."""
    w, said = args[0], args[1:]
    shape = said[0] if len(said) == 1 and isinstance(said[0], (list, tuple, torch.Size)) else said
    if not isinstance(w, LoraWeight) or kwargs or not all(type(n) is int for n in shape):
        return NotImplemented
    base = w.base.reshape(*shape)
    rank = w.right.shape[-2]
    if base.shape == w.base.shape:
        return w
    if w.base.dim() == 2 and base.dim() == 3 and base.shape[-1] == w.base.shape[-1]:
        left = w.left.reshape(*base.shape[:-1], rank)
        return LoraWeight.of(base, left, w.right.expand(base.shape[0], *w.right.shape), w.owner)
    return NotImplemented


_RULES = {
    "multi_head_attention_forward": _attention,
    "linear": _linear, "matmul": _matmul, "__matmul__": _matmul, "__rmatmul__": _rmatmul,
    "bmm": _matmul, "mm": _matmul, "addmm": _addmm, "baddbmm": _addmm, "einsum": _einsum, "embedding": _embedding,
    "grouped_mm": _grouped, "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped, "transformers.grouped_mm_fallback": _grouped,
    "__getitem__": _pick, "chunk": _chunk, "split": _chunk, "cat": _cat, "concat": _cat,
    "view": _reshaped, "reshape": _reshaped,
    "transpose": _turn, "swapaxes": _turn, "swapdims": _turn, ".mT": _turn, "permute": _permute,
    "t": _transpose_of_two, ".T": _transpose_of_two,
    **dict.fromkeys("float half bfloat16 double to type type_as contiguous clone detach cuda cpu .data".split(),
                    _retyped),
}  # fmt: skip
#: What asks about a tensor without computing with it.
_HARMLESS = frozenset(
    "size dim data_ptr stride is_contiguous element_size numel is_floating_point storage_offset __len__ __repr__ "
    "get_device .shape .dtype .device .ndim .is_cuda .is_cpu .is_meta .is_mps .layout .requires_grad .is_sparse "
    ".is_quantized .is_nested .itemsize .nbytes .grad .grad_fn .is_leaf .names .is_mkldnn .is_complex "
    "is_complex is_inference nelement ndimension".split()
)
