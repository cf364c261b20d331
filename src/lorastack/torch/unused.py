"""Unused: what of an attached stack no pass has come to."""

from __future__ import annotations

from typing import NamedTuple


class Unused(NamedTuple):
    """Weights that no pass has come to."""

    #: Of modules that their model did not call: a part that this input does not need, or one that has no effect at all.
    modules: tuple[str, ...]
    #: Of experts that no token was sent to.
    experts: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.modules or self.experts)

    def __str__(self) -> str:
        said = []
        if self.modules:
            said.append(f"{len(self.modules)} weights had no effect, such as {self.modules[0]}: no pass came there")
        if self.experts:
            said.append(f"{len(self.experts)} weights are of experts that no token was sent to")
        return "; ".join(said)
