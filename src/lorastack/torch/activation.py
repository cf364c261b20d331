"""Activation: where adapters with invocation tokens act - from the last occurrence of those tokens on, row by row.

Greenewald et al. 2025 (arXiv:2504.12397), and PEFT's rule: what lies before the tokens is the base's, so that its cache
can be another adapter's; a row without them is the base's altogether. A pass that goes on from a cache acts in the rows
in which the passes that filled it acted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorastack.errors import ArgumentError

#: More than any sequence has.
_ALL = 1 << 30
#: Entry -> on how many of the last positions it acts, ``[rows]``.
Acting = Mapping[int, torch.Tensor]


class Activation:
    """The invocation tokens of a handle's adapters, by entry."""

    def __init__(self, tokens: Mapping[int, tuple[int, ...]]) -> None:
        self.tokens = tokens
        self._known: WeakKeyDictionary[Any, dict[int, torch.Tensor]] = WeakKeyDictionary()

    def of(self, args: Any, kwargs: Any) -> Acting:
        """Where each of them acts in a pass.

        Raises
        ------
        ArgumentError
            When the pass has no token ids, or goes on from a cache of passes that were not seen.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ArgumentError(
                "an adapter with invocation tokens acts from them on, and this pass shows no input_ids to look for "
                "them in; call the whole model with input_ids, or set the adapter's scale to 0"
            )
        cache = _cache(kwargs.get)
        before = self._known.get(cache) if cache is not None else None
        seen = kwargs.get("attention_mask")
        longer = isinstance(seen, torch.Tensor) and seen.dim() == 2 and seen.shape[1] > ids.shape[1]
        if before is None and (longer or (cache is not None and _filled(cache))):
            raise ArgumentError(
                "this pass goes on from a cache whose tokens were not seen, so that nothing tells in which rows an "
                "adapter with invocation tokens acts; fill the cache while the stack is attached"
            )
        found = {}
        for entry, tokens in self.tokens.items():
            acting = _last(ids, tokens) if before is None or ids.shape[1] > 1 else ids.new_zeros(len(ids))
            found[entry] = acting if before is None else torch.where(before[entry].to(ids.device), _ALL, acting)
        if cache is not None:
            self.keep(cache, found)
        return found

    def left(self, output: Any, acting: Acting) -> None:
        """Remember where they acted in a pass that is over, if it has a cache to go on from."""
        cache = _cache(lambda name: getattr(output, name, None))
        if cache is not None:
            self.keep(cache, acting)

    def keep(self, cache: Any, acting: Acting) -> None:
        """Remember in which rows they act from now on, for passes that go on from this cache."""
        self._known[cache] = {entry: positions > 0 for entry, positions in acting.items()}


#: What transformers calls the cache of a pass, in its arguments and in its output.
_CACHES = ("past_key_values", "cache", "cache_params")


def _cache(get: Callable[[str], Any]) -> Any:
    return next((value for name in _CACHES if hasattr(value := get(name), "get_seq_length")), None)


def _filled(cache: Any) -> bool:
    try:
        return int(cache.get_seq_length()) > 0
    except (ValueError, IndexError):  # a cache of states has no length; one without layers is empty
        return bool(getattr(cache, "has_previous_state", lambda: False)())


def _last(ids: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """How many positions there are from the last occurrence of ``tokens`` on, ``[rows]``; 0 without one.

    >>> _last(torch.tensor([[5, 6, 7, 5, 6], [5, 5, 6, 7, 8], [1, 2, 3, 4, 5]]), (5, 6)).tolist()
    [2, 4, 0]
    """
    length = ids.shape[1]
    if length < len(tokens):
        return ids.new_zeros(len(ids))
    hits = (ids.unfold(1, len(tokens), 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    starts = torch.arange(1, hits.shape[1] + 1, device=ids.device)
    last = (hits * starts).amax(1)
    return torch.where(last > 0, length + 1 - last, 0)


def mask(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[rows, tokens, 1]``: the last ``positions`` of each row of ``like [rows, tokens, width]``."""
    tokens = like.shape[1] if like.dim() > 2 else 1
    at = torch.arange(tokens, device=like.device)
    acting = at >= tokens - positions.to(like.device).clamp_max(tokens)[:, None]
    return acting[..., None] if like.dim() > 2 else acting
