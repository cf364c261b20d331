"""vLLM's endpoint plugin: ``GET /v1/mixtures`` says which adapters there are, what is served, and the engine's limits.

It is loaded only where ``VLLM_PLUGINS`` names it, and then that variable has to name every other plugin too; mixtures
are served without it. `lorastack vllm-check` prints the whole command. Tried with vLLM 0.32.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from lorastack.fleet.vllm_plugin import RESOLVER

LOG = logging.getLogger("vllm.lorastack")


class MixturesEndpoint:
    """An entry point of ``vllm.endpoint_plugins``."""

    name = "lorastack_endpoint"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the route."""
        if not os.environ.get("LORASTACK_LIBRARY"):
            return

        @app.get("/v1/mixtures")  # type: ignore[untyped-decorator]
        async def mixtures() -> dict[str, Any]:
            return _said(app.state)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Note the engine, and say at once where its largest rank and ours differ, which the resolver is not told."""
        state.lorastack_engine = engine_client
        lora = None if engine_client is None else engine_client.vllm_config.lora_config
        if lora is None or not os.environ.get("LORASTACK_LIBRARY"):
            return
        from lorastack.fleet.settings import Settings

        settings = Settings.of(os.environ)
        if settings is not None and settings.max_rank != lora.max_lora_rank:
            LOG.warning(
                "LORASTACK_MAX_RANK is %d, --max-lora-rank %d: set the first to the second",
                settings.max_rank,
                lora.max_lora_rank,
            )


def _said(state: Any) -> dict[str, Any]:
    from vllm.lora.resolver import LoRAResolverRegistry

    from lorastack.fleet.library import Library

    lora = state.lorastack_engine.vllm_config.lora_config
    caches = LoRAResolverRegistry.get_resolver(RESOLVER).caches
    return {
        "adapters": Library(os.environ["LORASTACK_LIBRARY"]).names(),
        "served": {name: one.lora_path for name, one in state.openai_serving_models.lora_requests.items()},
        "leased": sum(cache.leased for cache in caches),
        "max_lora_rank": lora and lora.max_lora_rank,
        "max_loras": lora and lora.max_loras,
        "max_cpu_loras": lora and lora.max_cpu_loras,
    }
