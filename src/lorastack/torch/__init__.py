"""Stacks on live models: attach, change scales between two tokens, give every row of a batch its own mixture."""

from __future__ import annotations

from lorastack.errors import require

require("torch", "torch")

from lorastack.torch.attach import attach, attach_all  # noqa: E402
from lorastack.torch.handle import Handle, Report  # noqa: E402

__all__ = ["Handle", "Report", "attach", "attach_all"]
