"""LazyDeltas: weight names with their updates, each built when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorastack.core.delta import LoraDelta


class LazyDeltas(Mapping[str, LoraDelta]):
    """Weight names with their deltas, each built when first asked for.

    Opening a file checks everything its header can tell; the thousands of small objects for what may
    never be used would cost more than reading that header.
    """

    __slots__ = ("_build", "_built", "_how")

    def __init__(self, how: dict[str, Any], build: Callable[[str, Any], LoraDelta]) -> None:
        self._how = how
        self._build = build
        self._built: dict[str, LoraDelta] = {}

    def __getitem__(self, name: str) -> LoraDelta:
        delta = self._built.get(name)
        if delta is None:
            delta = self._built[name] = self._build(name, self._how[name])
        return delta

    def __contains__(self, name: object) -> bool:
        return name in self._how

    def __iter__(self) -> Iterator[str]:
        return iter(self._how)

    def __len__(self) -> int:
        return len(self._how)

    def __repr__(self) -> str:
        return f"{len(self)} deltas: {', '.join(list(self)[:3])}{', ...' if len(self) > 3 else ''}"
