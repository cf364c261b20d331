"""vLLM's plugin: a request whose model is ``zara:0.7+excited:0.3`` is answered with that stack, baked on first use.

`register` is an entry point of ``vllm.general_plugins``. Every process of vLLM calls it, whether anybody wants
mixtures or not: so without ``LORASTACK_LIBRARY`` it does nothing, and this module imports nothing but the standard
library. Only the API server asks the resolver, and only then the rest is imported. There is one:
several would number adapters each by itself, and vLLM does not start with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` and more
than one. Tried with vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorastack.fleet.cache import MixtureCache
    from lorastack.fleet.settings import Settings

LOG = logging.getLogger("vllm.lorastack")
RESOLVER = "lorastack"


def register() -> None:
    """Tell vLLM who knows mixtures, if ``LORASTACK_LIBRARY`` names a folder of adapters.

    Raises
    ------
    ArgumentError
        Listing every ``LORASTACK_`` variable whose value has no meaning; vLLM does not start then.
    """
    if not os.environ.get("LORASTACK_LIBRARY"):
        return
    from lorastack.fleet.settings import Settings

    settings = Settings.of(os.environ)
    assert settings is not None
    from vllm.lora.resolver import LoRAResolverRegistry

    if RESOLVER not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(RESOLVER, _resolver(settings))


def _resolver(settings: Settings) -> Any:
    from vllm.lora.resolver import LoRAResolver

    class MixtureResolver(LoRAResolver):  # type: ignore[misc]
        """What vLLM asks for adapters that it does not have yet."""

        def __init__(self) -> None:
            self._caches: dict[str, MixtureCache] = {}
            self._lock = threading.Lock()

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The baked mixture, or the HTTP error that says why not; None where another resolver may know the name."""
            from fastapi import HTTPException
            from vllm.lora.request import LoRARequest

            from lorastack.errors import LoraStackError, UnknownNameError
            from lorastack.fleet.answers import status_of

            begun = time.perf_counter()
            try:
                # The event loop goes on serving.
                path = await asyncio.to_thread(self._get, base_model_name, lora_name)
            except UnknownNameError as error:
                if _others_behind():
                    return None
                raise HTTPException(404, str(error)) from None  # None would only say that it does not exist
            except LoraStackError as error:
                raise HTTPException(status_of(error), str(error)) from None
            LOG.info("%s is %s (%.1f ms)", lora_name, path, 1e3 * (time.perf_counter() - begun))
            # The very name that was asked for, whatever its spelling: vLLM knows adapters by name, and stops when two
            # numbers have one name. It puts its own number in.
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

        def _get(self, base: str, name: str) -> str:
            with self._lock:
                cache = self._caches.get(base)
                if cache is None:
                    cache = self._caches[base] = settings.open_cache(base, "vllm")
            return str(cache.get(name))

        @property
        def caches(self) -> list[MixtureCache]:
            """Those there are, one for each base that was asked for."""
            return list(self._caches.values())

    return MixtureResolver()


def _others_behind() -> bool:
    """Whether vLLM will ask another resolver after ours."""
    from vllm.lora.resolver import LoRAResolverRegistry

    return list(LoRAResolverRegistry.get_supported_resolvers())[-1] != RESOLVER
