"""Journal: the trials of a search in a file, in Optuna's own storage, so that a search that was stopped goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorastack.errors import ArgumentError, shown
from lorastack.files import kind_of, read_head, status_of
from lorastack.torch.search import Trial, quiet

#: Of the one study in the file.
_NAME = "lorastack"


class Journal:
    """The file of one search; ``question`` is what was asked, which a search that goes on has to ask again.

    Raises
    ------
    ArgumentError
        When the file is none of Optuna's, or holds the answer to another question: listing what is another.
    """

    def __init__(self, optuna: Any, path: Path, question: Mapping[str, Any]) -> None:
        self._optuna, self.path = optuna, path
        status = status_of(path, ArgumentError)
        if status is not None and (kind := kind_of(status.st_mode)) != "a file":
            raise ArgumentError(f"{path}: it is {kind}, expected a file, or none yet")
        if status is not None and status.st_size and b'"op_code"' not in read_head(path, 200):  # it would be added to
            raise ArgumentError(f"{path}: it is no study of Optuna's; give another name")
        try:
            with quiet(optuna), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a storage that some versions call experimental
                storage = optuna.storages.JournalStorage(_backend(optuna, path))
                self._study = optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True)
        except Exception as error:  # whatever a file that is another's makes it stumble over
            raise ArgumentError(f"{path}: it is no study of Optuna's ({error}); give another name") from error
        said = self._study.user_attrs.get("question")
        if said is None:
            self._study.set_user_attr("question", dict(question))
        elif said != dict(question):
            other = [
                f"{key}: {shown(said.get(key))} then, {shown(question.get(key))} now"
                for key in {**said, **question}
                if said.get(key) != question.get(key)
            ]
            raise ArgumentError(f"{path}: it holds another search; ask the same, or give another name", other)

    def trials(self) -> list[Trial]:
        """The trials there are, in the order they were made."""
        kept = [trial.user_attrs for trial in self._study.trials]
        return [
            Trial({str(name): float(scale) for name, scale in one["scales"].items()}, float(one["score"]))
            for one in kept
            if "scales" in one
        ]

    def add(self, trial: Trial, low: float, high: float) -> None:
        """Keep a trial, before the next one is begun."""
        inside = all(low <= scale <= high for scale in trial.scales.values())
        wide = self._optuna.distributions.FloatDistribution(low, high)
        state = self._optuna.trial.TrialState
        finite = math.isfinite(trial.score)
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state.COMPLETE if finite else state.FAIL,
                value=trial.score if finite else None,
                params=dict(trial.scales) if inside else {},
                distributions=dict.fromkeys(trial.scales, wide) if inside else {},
                user_attrs={"scales": dict(trial.scales), "score": repr(trial.score)},
            )
        )


def _backend(optuna: Any, path: Path) -> Any:
    from optuna.storages import journal

    # The usual lock is a symbolic link, which not every system lets everybody make.
    lock = journal.JournalFileOpenLock(str(path))
    return journal.JournalFileBackend(str(path), lock_obj=lock)
