"""A base with every name and role that transformers' own class gives its tensors, where files do not show them.

Files tell the usual pair, an embedding and its ``lm_head``, which is all that the listed classes tie. BERT ties a bias
too and calls its head otherwise, CTRL its embedding; some make other tensors of what files hold.
"""

from __future__ import annotations

from dataclasses import replace

from lorastack.base.architectures import BY_HF
from lorastack.base.model import BaseModel


def with_all_names(base: BaseModel) -> BaseModel:
    """The base for whoever writes its tensors, or compares all of them; asking its class takes a second.

    As it is where its class is listed, or none is known.
    """
    live = base.live if base.architecture_name not in BY_HF else None
    if live is None:
        return base
    guessed = base.tied.keys() - live.shapes.keys()
    shapes = {name: shape for name, shape in base.shapes.items() if name not in guessed}
    stored = {name: place for name, place in base.stored.items() if name not in guessed}
    tied = {name: of for name, of in base.tied.items() if name not in guessed}
    for names in _names_of_one(live):
        for kept in [name for name in names if name in shapes and name not in tied][:1]:
            for name in (name for name in names if name not in shapes):
                shapes[name], stored[name], tied[name] = shapes[kept], stored[kept], kept
    rename = live.renaming() if live.renaming else None
    own = {name: rename(name) if rename else name for name in shapes}
    roles = {
        name: live.roles.get(own[name], "") if live.shapes.get(own[name]) == shape else "unknown"
        for name, shape in shapes.items()
    }
    return replace(base, shapes=shapes, stored=stored, tied=tied, roles=roles)


def _names_of_one(live: BaseModel) -> list[list[str]]:
    """The names of each tensor that has several, in the class's own order."""
    roots = dict.fromkeys(live.tied.values())
    return [[root, *(name for name, of in live.tied.items() if of == root)] for root in roots]
