"""Search: the scales tried so far, and ways to choose the next ones without gradients."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Direction = Literal["minimize", "maximize"]


class Trial(NamedTuple):
    """Scales that were tried, by adapter name, and their score; NaN or infinity where there was none."""

    scales: Mapping[str, float]
    score: float


@dataclass
class Search:
    """At most ``budget`` mixtures, each scored once.

    Examples
    --------
    >>> search = Search(("a",), lambda scales: (scales["a"] - 0.3) ** 2, budget=40, low=-1.0, high=1.0)
    >>> start = search.score([1.0])
    >>> search.refine()
    >>> start, search.best.scales
    (0.48999999999999994, {'a': 0.3})
    """

    names: Sequence[str]
    score_of: Callable[[Mapping[str, float]], float]
    budget: int
    low: float
    high: float
    direction: Direction = "minimize"
    progress: Callable[[int, int], None] | None = None
    #: Called with every trial that was made.
    keep: Callable[[Trial], None] | None = None
    trials: list[Trial] = field(default_factory=list)
    _seen: dict[tuple[float, ...], float] = field(default_factory=dict)
    _remembered: int = 0

    @property
    def best(self) -> Trial:
        """The best trial with a finite score; the first one when none has."""
        return min(self.trials, key=lambda trial: self._cost(trial.score))

    @property
    def tried(self) -> set[tuple[float, ...]]:
        """The scales of every trial."""
        return set(self._seen)

    def remember(self, trials: Sequence[Trial]) -> None:
        """Take trials that were made before for this search's own."""
        for trial in trials:
            self._seen[tuple(trial.scales[name] for name in self.names)] = trial.score
            self.trials.append(trial)
        self._remembered = len(trials)

    def score(self, scales: Sequence[float]) -> float:
        """The score of a mixture; of one that was tried before it is remembered."""
        key = tuple(scales)
        if key not in self._seen:
            named = dict(zip(self.names, key, strict=True))
            self._seen[key] = self.score_of(named)
            self.trials.append(Trial(named, self._seen[key]))
            if self.keep:
                self.keep(self.trials[-1])
            if self.progress:
                self.progress(len(self.trials), self.budget)
        return self._seen[key]

    def explore(self, optuna: Any, until: int, seed: int) -> None:
        """What Optuna's TPE sampler proposes, until there are so many trials.

        TPE, since it needs nothing but NumPy, takes failed trials, and costs milliseconds; multivariate, since the
        best scale of one adapter depends on the others'.
        """
        wide = dict.fromkeys(self.names, optuna.distributions.FloatDistribution(self.low, self.high))
        with quiet(optuna):
            with warnings.catch_warnings():
                # Optuna 4 calls `multivariate` experimental; Optuna 5 does not.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # A search that goes on would else propose what it began with.
                sampler = optuna.samplers.TPESampler(seed=seed + self._remembered, multivariate=True)
            study = optuna.create_study(sampler=sampler)
            for scales, value in self.trials:
                if math.isfinite(value) and all(self.low <= scale <= self.high for scale in scales.values()):
                    known = {"params": dict(scales), "distributions": wide, "value": self._cost(value)}
                    study.add_trial(optuna.trial.create_trial(**known))
            # A proposal may have been tried before; the loop is over proposals, so that it comes to an end.
            for _ in range(until - len(self.trials)):
                trial = study.ask(wide)
                cost = self._cost(self.score([self._rounded(trial.params[name]) for name in self.names]))
                if math.isfinite(cost):
                    study.tell(trial, cost)
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def refine(self) -> None:
        """Steps along one scale after the other from the best, halved when none helps, until the budget is used."""
        at, here = list(self.best.scales.values()), self._cost(self.best.score)
        step = (self.high - self.low) / 16
        way = [1.0] * len(at)  # the direction that helped last is tried first
        while math.isfinite(here) and step >= 0.001:
            better = False
            for axis in range(len(at)):
                for sign in (way[axis], -way[axis]):
                    if len(self.trials) >= self.budget:
                        return
                    there = [*at]
                    there[axis] = self._rounded(at[axis] + sign * step)
                    if (cost := self._cost(self.score(there))) < here:
                        at, here, way[axis], better = there, cost, sign, True
                        break
            if not better:
                step /= 2

    def _cost(self, value: float) -> float:
        """What is made small; infinite where there was no score."""
        return math.inf if not math.isfinite(value) else value if self.direction == "minimize" else -value

    def _rounded(self, scale: float) -> float:
        # Scales are read by people, and scores hardly tell a thousandth apart.
        return min(max(round(scale, 3), self.low), self.high)


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Without a line for each trial."""
    # A line for each trial is for studies that one watches; here the progress callback tells.
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
