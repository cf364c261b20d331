"""Perplexity: how well a model foretells texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorastack.errors import ArgumentError, Problems


class Perplexity:
    """``exp`` of the mean negative log likelihood of every token after the first of its text; lower is better.

    Texts are tokenised once, so that scoring again costs forward passes only. The model runs in its own dtype,
    without gradients; log-softmax and sum are in float32 and float64.

    Parameters
    ----------
    tokenizer
        As of ``transformers``; its special tokens are added as usual.
    texts
        One or more passages, each scored apart from the others.
    max_tokens
        Tokens the model can take at once, if known.
    batch_tokens
        Tokens of a batch, padding included; it bounds the memory that logits take (tokens times vocabulary).

    Raises
    ------
    ArgumentError
        Listing every text that has fewer than 2 tokens or more than ``max_tokens``.

    Examples
    --------
    >>> class Words:
    ...     def __call__(self, text):
    ...         return {"input_ids": [len(word) for word in text.split()]}
    >>> class Uniform(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return torch.zeros(*input_ids.shape, 8)
    >>> round(Perplexity(Words(), ["one by one", "two by two of three"])(Uniform()), 3)
    8.0
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], max_tokens: int | None = None, batch_tokens: int = 2048
    ) -> None:
        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
        problems = Problems("these texts cannot be scored")
        if not rows:
            problems.add("there is no text; give one at least")
        for n, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
            which = f"text {n} ({text[:30]!r}{'...' if len(text) > 30 else ''}) has {len(row)} tokens"
            if len(row) < 2:
                problems.add(f"{which}, and the first of a text is not scored; give 2 or more")
            if max_tokens is not None and len(row) > max_tokens:
                problems.add(f"{which}, the model takes {max_tokens}; split it")
        problems.raise_any(ArgumentError)
        self.sha256 = hashlib.sha256(repr(rows).encode()).hexdigest()
        # Texts of like length side by side, so that little is padded.
        rows.sort(key=len)
        self.tokens = sum(len(row) - 1 for row in rows)
        self._batches: list[list[list[int]]] = []
        for row in rows:
            if self._batches and len(row) * (len(self._batches[-1]) + 1) <= batch_tokens:
                self._batches[-1].append(row)
            else:
                self._batches.append([row])

    def __call__(self, model: nn.Module) -> float:
        """The perplexity under ``model`` as it is now; NaN or infinity when its logits are such."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for rows in self._batches:
                total += _nll(model, rows, device).cpu()
        mean = float(total) / self.tokens
        return math.exp(mean) if mean < 700 else mean * math.inf  # exp(710) is more than a float holds


def _nll(model: nn.Module, rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """The summed negative log likelihood of some texts, float64.

    Padding is on the right, where no token that counts can see it.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    found = model(input_ids=ids, attention_mask=mask)
    logits = getattr(found, "logits", found)
    # Row by row: float32 copies of all logits at once would take several times the model's own output.
    losses = [
        nn.functional.cross_entropy(logits[n, : len(row) - 1].float(), ids[n, 1 : len(row)], reduction="sum").double()
        for n, row in enumerate(rows)
    ]
    return torch.stack(losses).sum()
