"""Method: how a stack becomes one adapter, by name, with its settings."""

from __future__ import annotations

from dataclasses import dataclass

from lorastack.algebra.spaces import SPACES
from lorastack.errors import ArgumentError, did_you_mean
from lorastack.ways import argument

#: Rules that work entry by entry, with the part of entries each keeps where nothing is said.
_RULES = {"magnitude_prune": 0.2, "ties": 0.2, "dare": 0.5, "dare_ties": 0.5}
#: Every method by name, with the part of entries it keeps where nothing is said; None where it keeps all.
METHODS: dict[str, float | None] = {
    **dict.fromkeys(("cat", "linear", "svd")),
    **{f"{rule}@{space}": density for rule, density in _RULES.items() for space in SPACES},
}


@dataclass(frozen=True)
class Method:
    """A method with its settings: ``density`` is the part of entries kept, ``seed`` that of random masks."""

    name: str
    density: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, name: str, density: float | None = None, seed: int = 0) -> Method:
        """The method of that name; ArgumentError when there is none, or a setting has no meaning for it."""
        if name not in METHODS:
            near = [method for method in METHODS if method.startswith(f"{name}@")]
            raise ArgumentError(
                f"{argument('method')} {name!r} works on entries, so it needs a space: {', '.join(near)}"
                if near
                else f"there is no method {name!r}; there are {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
            )
        if METHODS[name] is None and density is not None:
            raise ArgumentError(f"{argument('density')} has no meaning for {name}, which keeps every entry")
        chosen = METHODS[name] if density is None else density
        if chosen is not None and not 0 < chosen <= 1:
            raise ArgumentError(
                f"{argument('density')} is {density!r}, expected a number above 0 and up to 1, such as 0.2"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ArgumentError(f"{argument('seed')} is {seed!r}, expected a whole number from 0 on")
        return cls(name, chosen, seed)

    @property
    def rule(self) -> str:
        """What is done with the entries."""
        return self.name.partition("@")[0]

    @property
    def space(self) -> str:
        """Whose entries they are; empty for sums."""
        return self.name.partition("@")[2]
