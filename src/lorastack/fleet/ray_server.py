"""Ray Serve LLM: ``"model": "base:zara:0.7+excited:0.3"``, where each replica bakes the mixtures that it is asked for.

``MixtureServer`` is the class for ``LLMConfig(server_cls="lorastack.fleet.ray_server:MixtureServer")``; what stands in
front of the first colon of a model's name is Ray's id of the base. It leans on parts of Ray that are not public, so it
says when Ray is another than it was tried with. A replica is one vLLM engine: the settings are those of vLLM's plugin,
in the environment of the replicas (``runtime_env``), and the library has to lie at the same place on each node.

Tried by hand with Ray 2.60 and vLLM 0.32 on one machine with one replica on the CPU: a base, mixtures, what is refused
with its status, 16 requests at once. NOT tried: several nodes, autoscaling, prefill and decode apart, data-parallel
replicas, direct streaming.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from lorastack.errors import MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    MixtureServer: Any

#: Versions of Ray that it was tried with, and how to go on with another at one's own risk.
TRIED = ("2.60",)
UNTRIED = "LORASTACK_RAY_UNTRIED"


def __getattr__(name: str) -> Any:
    if name != "MixtureServer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _server_class()
    return found


def check_version(version: str) -> None:
    """Refuse a Ray that this was not tried with.

    >>> check_version("2.60.1")
    >>> check_version("1.13.0")
    Traceback (most recent call last):
    ...
    lorastack.errors.UnsupportedError: this was tried with Ray 2.60, here is 1.13.0: what it leans on may be another there; set LORASTACK_RAY_UNTRIED=1 to try it
    """  # noqa: E501
    if ".".join(version.split(".")[:2]) not in TRIED and os.environ.get(UNTRIED) != "1":
        raise UnsupportedError(
            f"this was tried with Ray {', '.join(TRIED)}, here is {version}: what it leans on may be another there; "
            f"set {UNTRIED}=1 to try it"
        )


def _server_class() -> type:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"this needs Ray ({error}); run: pip install 'ray[serve]'") from error
    check_version(ray.__version__)
    try:
        from ray.llm._internal.common.utils.lora_utils import get_lora_id
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
        from ray.llm._internal.serve.core.server.llm_server import LLMServer
        from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader
        from ray.serve import get_multiplexed_model_id
    except ImportError as error:
        raise UnsupportedError(f"Ray {ray.__version__} lacks what this leans on: {error}") from error

    class MixtureLoader(LoraModelLoader):  # type: ignore[misc]
        """Bakes a mixture where Ray's own loader would fetch an adapter from a bucket."""

        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            self._cache: Any = None
            self._lock = asyncio.Lock()

        async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Any:
            from fastapi import HTTPException

            from lorastack.errors import LoraStackError
            from lorastack.fleet.answers import status_of

            try:
                async with self._lock:
                    if self._cache is None:
                        self._cache = await asyncio.to_thread(_cache_of, llm_config)
                path = await asyncio.to_thread(self._cache.get, get_lora_id(lora_model_id))
            except LoraStackError as error:
                raise HTTPException(status_of(error), str(error)) from None
            # Ray does not use the number: vLLM gives its own.
            return DiskMultiplexConfig(
                model_id=lora_model_id, max_total_tokens=None, local_path=str(path), lora_assigned_int_id=1
            )

    class MixtureServer(LLMServer):  # type: ignore[misc]
        """Ray's server of one engine, which takes mixtures for models."""

        def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:
            super()._init_multiplex_loader(model_downloader_cls or MixtureLoader)
            self._resolving: dict[str, asyncio.Lock] = {}

        async def _maybe_resolve_lora_from_multiplex(self) -> None:
            # One at a time: to the second of two requests for a new name vLLM says that it has that adapter already,
            # which Ray takes for an error.
            async with self._resolving.setdefault(get_multiplexed_model_id(), asyncio.Lock()):
                await super()._maybe_resolve_lora_from_multiplex()

    MixtureServer.__module__, MixtureServer.__qualname__ = __name__, "MixtureServer"
    return MixtureServer


def _cache_of(config: Any) -> Any:
    """The cache for the base of a replica, and the largest rank that its engine is started for."""
    from lorastack.errors import ArgumentError
    from lorastack.fleet.settings import MAX_RANK, Settings

    settings = Settings.of(os.environ)
    if settings is None:
        raise ArgumentError("LORASTACK_LIBRARY is not set where Ray's replicas run; name it in their runtime_env")
    base = config.model_loading_config.model_source or config.model_id
    return settings.open_cache(str(base), "vllm", config.engine_kwargs.get("max_lora_rank", MAX_RANK))
