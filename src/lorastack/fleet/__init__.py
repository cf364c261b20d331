"""Fleet: weighted stacks on engines that take one adapter for a request; a library of adapters, a cache of mixtures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorastack.fleet.baking import Baking as Baking
    from lorastack.fleet.cache import CacheFullError as CacheFullError
    from lorastack.fleet.cache import MixtureCache as MixtureCache
    from lorastack.fleet.library import Library as Library

#: Imported when first asked for: plugins of engines lie in this package, and every process of an engine loads them.
_HOMES = {"Baking": "baking", "CacheFullError": "cache", "Library": "library", "MixtureCache": "cache"}
__all__ = ["Baking", "CacheFullError", "Library", "MixtureCache"]  # noqa: PLE0604, RUF100


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
