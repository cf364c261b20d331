"""Settings: what engines' plugins are told by the environment. Nothing is imported until a cache is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorastack.fleet.cache import MixtureCache

#: vLLM's own default of --max-lora-rank.
MAX_RANK = 16
MAX_BYTES, MAX_MIXTURES = 1 << 30, 1000


@dataclass(frozen=True)
class Settings:
    """One field for each variable: ``LORASTACK_LIBRARY`` and so on.

    Attributes
    ----------
    library
        The folder with the adapters.
    cache
        The folder for baked mixtures; below ``~/.cache`` when not given.
    max_rank, tolerance, uniform
        As of `lorastack.fleet.Baking`.
    cache_bytes, max_mixtures
        ``max_bytes`` and ``max_mixtures`` of `lorastack.fleet.MixtureCache`.
    """

    library: Path
    cache: Path
    max_rank: int = MAX_RANK
    tolerance: float = 0.0
    uniform: bool = False
    cache_bytes: int = MAX_BYTES
    max_mixtures: int = MAX_MIXTURES

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """What the variables say; None without ``LORASTACK_LIBRARY``.

        Raises
        ------
        ArgumentError
            Listing every variable whose value has no meaning.

        Example
        -------
        >>> Settings.of({})
        >>> Settings.of({"LORASTACK_LIBRARY": ".", "LORASTACK_MAX_RANK": "32"}).max_rank
        32
        """
        library = environment.get("LORASTACK_LIBRARY")
        if not library:
            return None
        problems: list[str] = []

        def read(name: str, kind: Callable[[str], Any], default: Any, good: Callable[[Any], bool], what: str) -> Any:
            text = environment.get(f"LORASTACK_{name}", "")
            if not text:
                return default
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not good(value):
                problems.append(f"LORASTACK_{name} is {text[:80]!r}, expected {what}")
            return value

        def whole(value: int) -> bool:
            return value > 0

        settings = cls(
            Path(library).expanduser(),
            Path(environment.get("LORASTACK_CACHE") or _cache_home(environment)).expanduser(),
            read("MAX_RANK", int, MAX_RANK, whole, "a rank, such as 32"),
            read("TOLERANCE", float, 0.0, lambda v: math.isfinite(v) and 0 <= v < 1, "a relative error such as 0.01"),
            read("UNIFORM", int, 0, lambda v: v in (0, 1), "1 or 0") == 1,
            read("CACHE_BYTES", int, MAX_BYTES, whole, "a number of bytes"),
            read("MAX_MIXTURES", int, MAX_MIXTURES, whole, "a number of mixtures"),
        )
        if not settings.library.is_dir():
            problems.append(f"LORASTACK_LIBRARY is {library!r}, which is no folder")
        if problems:
            from lorastack.errors import ArgumentError

            raise ArgumentError("the settings of lorastack's plugin have no meaning", problems)
        return settings

    def open_cache(self, base: str, target: str, max_rank: int | None = None) -> MixtureCache:
        """The cache for an engine's base and its row of `lorastack.targets`."""
        from lorastack.fleet.baking import Baking
        from lorastack.fleet.cache import MixtureCache

        baking = Baking(base, target, max_rank or self.max_rank, self.tolerance, self.uniform)
        return MixtureCache(
            self.cache, self.library, baking, max_bytes=self.cache_bytes, max_mixtures=self.max_mixtures
        )


def _cache_home(environment: Mapping[str, str]) -> str:
    home = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(home, "lorastack", "mixtures")
