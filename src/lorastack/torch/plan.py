"""Plan: the mixtures that a context's rows have, by adapter name; it can be entered in other threads and tasks too."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from lorastack.errors import ArgumentError, ShapeError


class Holding:
    """A plan that a context was given, until it is taken back: by value, whichever context does that."""

    __slots__ = ("open", "plan")

    def __init__(self, plan: Plan) -> None:
        self.plan, self.open = plan, True


_HELD: ContextVar[tuple[Holding, ...]] = ContextVar("lorastack_rows", default=())


def plan_of_context(number: int) -> Plan | None:
    """The plan that this context holds for the handle of that number, the innermost; None without."""
    for held in reversed(_HELD.get()):
        if held.open and held.plan.number == number:
            return held.plan
    return None


class Plan:
    """Which adapters each row of a batch has, made by `Handle.rows`, `Handle.plain` and `Handle.current`.

    A context manager: inside ``with plan:`` the passes of this thread or task have it, wherever it was made.

    Parameters
    ----------
    number, holders
        Of the handle: its number, and the holdings that keep others from passing without rows.
    mixtures
        One mapping of adapter name to scale for each row; None for the stack's own scales.
    make
        (mixtures) -> what the rows are computed with.
    index
        Packed input: the row of every token, ``[tokens]``.
    copies
        How often each row stands in the batch, side by side.
    write
        (what the rows are computed with, other mixtures) -> nothing; see `write`.
    way
        How the rows are computed, where that was asked for.
    ways
        (what the rows are computed with) -> weight: the way it is computed.
    """

    def __init__(
        self,
        number: int,
        holders: set[Any],
        mixtures: Sequence[Mapping[str, float]] | None,
        make: Callable[[Sequence[Mapping[str, float]]], Any] | None = None,
        index: torch.Tensor | None = None,
        copies: int = 1,
        write: Callable[[Any, Sequence[Mapping[str, float]]], None] | None = None,
        way: str | None = None,
        ways: Callable[[Any], dict[str, str]] | None = None,
    ) -> None:
        self.number, self.mixtures, self.index, self.copies = number, mixtures, index, copies
        self.way = way
        self._holders, self._make, self._write, self._ways = holders, make, write, ways
        self._made: tuple[int, Any] | None = None

    def made(self, version: int) -> Any:
        """What the rows are computed with; made once for each set of attached adapters."""
        if self._made is None or self._made[0] != version:
            assert self._make is not None
            self._made = (version, self._make(self.mixtures or ()))
        return self._made[1]

    @property
    def ways(self) -> dict[str, str]:
        """Weight -> how its rows were computed in the plan's last pass outside of compiled code: "dense", "each",
        "pages", or "in order", adapter after adapter. Empty before the first pass, and without rows.
        """
        return {} if self._made is None or self._ways is None else self._ways(self._made[1])

    def write(self, mixtures: Sequence[Mapping[str, float]]) -> None:
        """Other mixtures in place of the plan's, in the same memory: for a graph that was captured with it.

        Between passes, and as often as a batch changes; a graph that is replayed then computes with these. There are as
        many rows as before.

        Raises
        ------
        UnknownNameError
            Listing every name that is not attached.
        ArgumentError
            When there are more or fewer rows, or one has more pages of factors than there is room for. Nothing is
            changed then.
        """
        mixtures = [dict(mixture) for mixture in mixtures]
        if self.mixtures is None or self._write is None or len(mixtures) != len(self.mixtures):
            rows = "no rows" if self.mixtures is None else f"{len(self.mixtures)} rows"
            raise ArgumentError(f"the plan has {rows}, and {len(mixtures)} mixtures were given; make another plan")
        if self._made is not None:
            self._write(self._made[1], mixtures)
        self.mixtures = mixtures

    def check_batch(self, batch: int | None) -> int:
        """The rows of the batch; ShapeError when they are not those of the plan."""
        assert self.mixtures is not None
        rows = len(self.mixtures)
        if self.index is not None or batch is None or batch == rows * self.copies:
            return batch or rows * self.copies
        if self.copies == 1 and batch == rows * _beams():
            return batch
        said = f"{rows} mixtures" + (f" of {self.copies} copies" if self.copies > 1 else "")
        raise ShapeError(
            f"the batch has {batch} rows, there are {said}; give one for each row, or rows(..., copies=n) where each "
            "stands n times side by side, as beams do"
        )

    def logits_of(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Packed input: the rows of those tokens whose logits are asked for (``logits_to_keep``)."""
        keep = kwargs.get("logits_to_keep")
        if self.index is None or keep is None or (isinstance(keep, int) and keep == 0):
            return None
        return self.index[-keep:] if isinstance(keep, int) else self.index[keep.reshape(-1).to(self.index.device)]

    def __enter__(self) -> Plan:
        held = Holding(self)
        _HELD.set((*(one for one in _HELD.get() if one.open), held))
        if self.mixtures is not None:
            self._holders.add(held)
        return self

    def __exit__(self, *_: Any) -> None:
        mine = next((one for one in reversed(_HELD.get()) if one.plan is self and one.open), None)
        # Left in another context than it was entered in, as by a task that closes another's generator.
        held = mine or next((one for one in tuple(self._holders) if one.plan is self), None)
        if held is not None:
            held.open = False
            self._holders.discard(held)
        _HELD.set(tuple(one for one in _HELD.get() if one.open))


def token_rows(cu_seqlens: Any, index: Any, rows: int) -> torch.Tensor | None:
    """The row of every token of a packed batch, on the host; None for an ordinary one."""
    if cu_seqlens is not None and index is not None:
        raise ArgumentError("give cu_seqlens or index, not both")
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens).long().cpu()
        if len(bounds) != rows + 1 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
            raise ArgumentError(f"cu_seqlens is {bounds.tolist()}, expected 0 and {rows} ascending ends")
        return torch.repeat_interleave(torch.arange(rows), bounds.diff())
    if index is None:
        return None
    index = torch.as_tensor(index).long().reshape(-1).cpu()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
        raise ArgumentError(f"index names rows {int(index.min())} to {int(index.max())}, there are {rows}")
    return index


#: What models call the tensor that has a row for each row of the batch, the likeliest first.
_INPUTS = (
    "input_ids inputs_embeds decoder_input_ids decoder_inputs_embeds input_features input_values pixel_values "
    "hidden_states x"
).split()


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | None, int]:
    """The rows of a call's batch, None when it has no tensor that tells; and its tokens in each, 0 where not known."""
    named = (kwargs[name] for name in _INPUTS if name in kwargs) if kwargs else ()
    for tensor in itertools.chain(named, args, kwargs.values()):
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
            batch = int(tensor.shape[0]) if tensor.dim() > 1 else 1
            return batch, int(tensor.shape[1]) if tensor.dim() > 1 and not _is_sound(tensor) else 0
    return None, 0


def _is_sound(tensor: torch.Tensor) -> bool:
    """Whether this is sound or a picture, whose second axis is not that of tokens."""
    return tensor.is_floating_point() and tensor.dim() != 3


#: The sizes of the pictures and films of a batch, in patches, ``[pictures, 3]``.
_GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")


def is_uneven(kwargs: Mapping[str, Any], rows: int) -> bool:
    """Whether pictures differ in size, or in number from row to row, so that their patches do not tell the rows."""
    for name in _GRIDS:
        grid = kwargs.get(name)
        if isinstance(grid, torch.Tensor) and grid.dim() == 2:
            patches = grid.prod(1)
            if len(grid) % rows or bool((patches != patches[0]).any()):
                return True
    return False


def rows_of_layer(x: torch.Tensor, batch: int, name: str = "a layer") -> int:
    """Tokens of each row at a layer, whose input is ``[batch, ..., in]``, or flat ``[batch * tokens, in]``.

    Raises
    ------
    ShapeError
        When the layer's input is not the batch's.
    """
    tokens = x.numel() // x.shape[-1]
    if (x.dim() > 2 and x.shape[0] != batch) or tokens % batch:
        raise ShapeError(f"{name or 'a layer'} got {list(x.shape)}, in a pass of {batch} rows; its rows cannot be told")
    return tokens // batch


def _beams() -> int:
    """How often transformers' ``generate``, if it is what called, has each row stand side by side."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            said = frame.f_locals.get("generation_config")
            return max(getattr(said, "num_beams", None) or 1, getattr(said, "num_return_sequences", None) or 1)
        frame = frame.f_back
    return 1
