"""How the rows of a batch lie in the layers of some models: time before batch, tables that all rows share, experts.

What is not listed has the batch first, or a layer's input is refused when it comes. A batch of as many rows as tokens
looks the same either way round, so a model that turns its batch over has to be known.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: The last part of a class's module in transformers, and the class below which the batch is the second axis.
_TIME_FIRST = {
    ("modeling_xlnet", "XLNetFeedForward"),
    ("modeling_longformer", "LongformerSelfAttention"),
    ("modeling_led", "LEDEncoderSelfAttention"),
    ("modeling_fsmt", "EncoderLayer"),
    ("modeling_fsmt", "DecoderLayer"),
}
#: The same of a model whose embedding is handed the ids turned over.
_IDS_TURNED = {("modeling_xlnet", "XLNetModel")}
#: Layers that see a table of positions, one for all rows.
_TABLE = re.compile(
    r"(?:^|\.)(?:relative_attention_bias|rel_embeddings|pos_proj|pos_q_proj|pos_key_proj|pos_query_proj|linear_pos|r_net)$"
)
#: Experts that are layers of their own are handed the tokens that chose them.
_EXPERT = re.compile(r"(?:^|\.)experts?\.(?:expert_)?\d+\.")
#: Parts of a model that see pictures.
_PICTURES = re.compile(r"(?:^|\.)(?:visual|vision_\w+)\.")


def time_first(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that are handed ``[tokens, rows, ...]``."""
    found: set[nn.Module] = set()
    for module in model.modules():
        kind = (type(module).__module__.rpartition(".")[2], type(module).__name__)
        if kind in _TIME_FIRST:
            found.update(module.modules())
        elif kind in _IDS_TURNED:
            found.update(child for child in module.children() if isinstance(child, nn.Embedding))
    return found


def without_rows(name: str, parent: nn.Module | None) -> str | None:
    """Why the tokens of a layer cannot be told apart by row; None where they can."""
    path = name.rpartition(".")[0]
    if _TABLE.search(path):
        return f"it changes {name}, which sees a table of positions that all rows share"
    config: Any = getattr(parent, "share_att_key", None)
    if config and path.endswith(("query_proj", "key_proj")) and getattr(parent, "relative_attention", False):
        return f"it changes {name}, which sees a table of positions that all rows share (share_att_key)"
    if _EXPERT.search(name):
        return "it changes experts, whose tokens are no longer in rows"
    return None


def sees_pictures(name: str) -> bool:
    """Whether a layer is of a part that sees pictures, whose patches follow each other."""
    return _PICTURES.search(name) is not None
