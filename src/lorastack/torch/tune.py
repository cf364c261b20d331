"""Tune: search a stack's scales for the best score, without gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorastack.core.adapter import LoadedLora
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, LoraStackError, Problems, require
from lorastack.formats.provenance import hashes
from lorastack.recipe import Recipe
from lorastack.torch.attach import attach_all
from lorastack.torch.journal import Journal
from lorastack.torch.perplexity import Perplexity
from lorastack.torch.search import Direction, Search, Trial
from lorastack.ways import argument


@dataclass(frozen=True)
class Tuned:
    """What a search found: the best scales, and every trial on the way."""

    entries: tuple[tuple[LoadedLora, float], ...]
    scales: Mapping[str, float]
    score: float
    #: At the stack's own scales: of equal weights, where all were given the same.
    equal: float
    #: With every scale 0.
    base: float
    trials: tuple[Trial, ...]
    direction: Direction
    #: What the score is: ``perplexity`` or ``score``.
    measure: str
    #: Whether it was interrupted before it came to its end.
    stopped: bool = False

    @property
    def stack(self) -> LoraStack:
        """The adapters as given, at the best scales.

        Raises
        ------
        NamingError
            When adapters of both GGUF and Hugging Face names were tuned side by side.
        """
        return LoraStack(self.entries)

    @property
    def failed(self) -> int:
        """How many trials had no finite score."""
        return sum(not math.isfinite(trial.score) for trial in self.trials)

    def recipe(self, base: str | None = None) -> Recipe:
        """The best stack as a recipe, with the hashes of its files; ``recipe().to_toml()`` is what to write."""
        ingredients = [
            replace(one, scale=one.scale * scale)
            for lora, scale in self.entries
            for one in Recipe.of_lora(lora).ingredients
        ]
        return Recipe(tuple(ingredients), base)


def tune(
    model: nn.Module,
    stack: LoraStack | Sequence[tuple[LoadedLora, float]],
    score: Callable[[Any], float] | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    low: float = -0.5,
    high: float = 1.5,
    trials: int = 60,
    seed: int = 0,
    direction: Direction | None = None,
    progress: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    keep_best: bool = False,
) -> Tuned:
    """Search the scales under which a model scores best, with Optuna; scales change in place, nothing is reloaded.

    The stack's own scales and the bare base are scored first, so the best is never worse than either. Then Optuna's
    TPE sampler looks everywhere between ``low`` and ``high``, and the last third of the trials steps downhill from
    the best found, which TPE alone would only come near to. The same seed gives the same answer.

    Parameters
    ----------
    model
        Left bit-identical and free of hooks. It is in ``eval()`` meanwhile, so that dropout is no part of the score.
    stack
        The adapters, at the scales to begin with; or pairs of adapter and scale, which may be of any naming.
    score
        Called with the model as each mixture makes it; returns a number. The higher the better, unless
        ``direction`` says otherwise. One that is not finite is a failed trial, never chosen.
    texts, tokenizer
        Instead of ``score``: the perplexity of these passages, the lower the better.
    low, high
        The range of every scale. Found scales are multiples of 0.001.
    trials
        Mixtures to score at most, 3 or more; about 20 for each adapter is enough for a few.
    progress
        Called with the trials done and the trials there may be.
    resume
        A file, in Optuna's own storage, that keeps every trial as it is made; where it is there already, the search
        goes on from it. ``trials`` counts those too.
    keep_best
        On Ctrl-C return the best so far, with ``stopped`` set, if there is one.

    Raises
    ------
    ArgumentError
        Listing everything that is wrong with the request; or when no trial had a finite score.
    UnsupportedError
        When the stack does not fit the model, as of `attach`.
    MissingDependencyError
        Without optuna: ``pip install 'lorastack[tune]'``.

    Examples
    --------
    >>> import numpy as np
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> lora = LoadedLora.from_tensors({"0.weight": (np.ones((1, 1)), np.ones((1, 1)))}, name="ones")
    >>> base = model[0].weight.item()
    >>> found = tune(model, LoraStack([(lora, 1.0)]), lambda m: -abs(m(torch.ones(1)).item() - base - 0.3), trials=30)
    >>> abs(found.scales["ones"] - 0.3) < 0.02, found.equal < found.score
    (True, True)
    """
    entries, scorer = _checked(model, stack, score, texts, tokenizer, low, high, trials, direction)
    optuna: Any = require("optuna", "tune")
    measure = "score" if score is not None else "perplexity"
    direction = direction or ("maximize" if score is not None else "minimize")
    with attach_all(model, entries) as handle, _in_eval(model), torch.no_grad():

        def score_of(scales: Mapping[str, float]) -> float:
            handle.set_scales(scales)
            return _number(scorer(model))

        search = Search(handle.names, score_of, trials, low, high, direction, progress)
        if resume is not None:
            asked = {"adapters": _adapters(handle.names, entries), "measure": measure, "direction": direction,
                     "model": f"{type(model).__name__} of {sum(p.numel() for p in model.parameters())} parameters",
                     "texts": getattr(scorer, "sha256", None)}  # fmt: skip
            journal = Journal(optuna, Path(resume), asked)
            search.remember(journal.trials())
            search.keep = partial(journal.add, low=low, high=high)
        stopped = False
        start, none = [scale for _, scale in entries], [0.0] * len(entries)
        try:
            search.score(start)
            search.score(none)
            search.explore(optuna, until=trials - trials // 3, seed=seed)
            search.refine()
        except KeyboardInterrupt:
            if not keep_best or not {tuple(start), tuple(none)} <= search.tried:
                raise
            stopped = True
        equal, base = search.score(start), search.score(none)
    best = search.best
    if not math.isfinite(best.score):
        raise ArgumentError(
            f"no mixture has a finite score: all {len(search.trials)} trials gave NaN or infinity; "
            f"look at what the score computes, or narrow {argument('low')} and {argument('high')}"
        )
    found = tuple((lora, scale) for (lora, _), scale in zip(entries, best.scales.values(), strict=True))
    return Tuned(found, best.scales, best.score, equal, base, tuple(search.trials), direction, measure, stopped)


def _adapters(names: Sequence[str], entries: Sequence[tuple[LoadedLora, float]]) -> dict[str, Any]:
    """Name -> the hashes of its files, by which a search that goes on knows its adapters."""
    return {name: hashes(lora) for name, (lora, _) in zip(names, entries, strict=True)}


def _checked(
    model: nn.Module,
    stack: Any,
    score: Any,
    texts: Any,
    tokenizer: Any,
    low: float,
    high: float,
    trials: int,
    direction: Any,
) -> tuple[list[tuple[LoadedLora, float]], Callable[[Any], Any]]:
    """The adapters with their scales and what scores them, or one error that lists all that is wrong."""
    problems = Problems("the scales cannot be searched")
    entries = [(lora, float(scale)) for lora, scale in (stack.entries if isinstance(stack, LoraStack) else stack)]
    second = len(stack.adapters) if isinstance(stack, LoraStack) else 0
    if second:
        problems.add(f"{second} of the stack's adapters were pushed with push_adapter() and have no scale; use push()")
    if not entries and not second:
        problems.add("the stack is empty; push an adapter first")
    if score is None and texts is None:
        problems.add("there is nothing to score by; give texts with their tokenizer, or a score(model)")
    if score is not None and texts is not None:
        problems.add("texts and a score are given; choose one")
    if score is not None and not callable(score):
        problems.add(f"score is {type(score).__name__}, expected a function that takes the model")
    if isinstance(texts, str):
        problems.add("texts is one string, expected a list of passages")
    elif texts is not None and tokenizer is None:
        problems.add("texts need the model's tokenizer")
    elif texts is not None:
        try:
            score = Perplexity(tokenizer, texts, _max_tokens(model))
        except LoraStackError as error:
            for line in error.problems:
                problems.add(line)
    if type(trials) is not int or trials < 3:
        problems.add(
            f"{argument('trials')} is {trials!r}, expected 3 or more: two go to the stack as given and the base"
        )
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        problems.add(
            f"{argument('low')} is {low!r} and {argument('high')} is {high!r}, "
            "expected finite numbers, the first one lower"
        )
    if direction not in (None, "minimize", "maximize"):
        problems.add(f"direction is {direction!r}, expected minimize or maximize")
    problems.raise_any(ArgumentError)
    return entries, score


def _number(said: Any) -> float:
    try:
        return float(said)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"the score is {type(said).__name__}, expected a number ({error})") from error


def _max_tokens(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
