"""Stacks on live models: attach, hot scales between two tokens, mixtures by row, the search for the best scales."""

from __future__ import annotations

from lorastack.errors import require

require("torch", "torch")

from lorastack.torch.attach import attach, attach_all, detach  # noqa: E402
from lorastack.torch.handle import Handle, Report  # noqa: E402
from lorastack.torch.merged import MergedStack, merge_into  # noqa: E402
from lorastack.torch.tune import Tuned, tune  # noqa: E402

__all__ = ["Handle", "MergedStack", "Report", "Tuned", "attach", "attach_all", "detach", "merge_into", "tune"]
