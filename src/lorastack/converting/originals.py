"""Updates under the names of a model's own code, as ComfyUI has them: what diffusers keeps apart is one again.

``[B_q A_q; B_k A_k; B_v A_v]`` is the product of a block-diagonal B with the A's one below the other, so the rank of
the whole is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np

from lorastack.base.known_paths import unet_originals
from lorastack.base.model import BaseModel
from lorastack.base.originals import originals
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.core.factor import JoinedFactor
from lorastack.core.lazy import LazyDeltas
from lorastack.core.placed import common_scaling, folded, placed
from lorastack.errors import NamingError, Problems
from lorastack.ways import BASE, drop_extras, ways

#: A pipeline's model -> what ComfyUI calls it.
_FRONTS = {
    "unet": "diffusion_model.",
    "transformer": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
_SD3 = ("joint_blocks.", "x_embedder.", "t_embedder.", "y_embedder.")
#: Extras that are a module's own, and go where it goes while it is not joined with others.
_ALONG = ("dora", "diff", "lokr")


def under_original_names(lora: LoadedLora, base: BaseModel | None) -> LoadedLora:
    """The adapter, whose names are those of a pipeline, under the names of ComfyUI.

    Raises
    ------
    NamingError
        Listing every weight that has no name there, or whose companions in one tensor are of unknown size.
    """
    problems = Problems(f"{lora.name} cannot be written as ComfyUI reads it")
    names: dict[str, Sequence[str]] = {}  # new name -> the weights it is made of; one in two halves is marked
    where: dict[str, str] = {}
    models: dict[str, list[str]] = {}
    every = [*lora.adapters, *(name for kind in _ALONG for name in lora.extras.get(kind, {}))]
    for name in dict.fromkeys(every):
        model, _, path = name.removesuffix(".weight").partition(".")
        models.setdefault(model, []).append(path)
    for model, paths in models.items():
        front = _FRONTS.get(model)
        if front is None:
            problems.add(f"{len(paths)} weights of {model}, such as {paths[0]}: ComfyUI has no such model")
            continue
        known = _known(model, paths, base)
        for path in paths:
            original, targets = known.get(path, (path, (path,)))
            if path not in known and model in ("unet", "transformer"):
                problems.add(f"weight {model}.{path}: what its own code calls it is not known{ways(BASE)}")
            new = f"{front}{original}.weight"
            names[new] = [f"{'~' if t[0] == '~' else ''}{model}.{t.removeprefix('~')}.weight" for t in targets]
            where[f"{model}.{path}.weight"] = new
    sizes = {new: [_rows(one, lora, base) for one in parts] for new, parts in names.items()}
    for new, rows in sizes.items():
        if 0 in rows:
            problems.add(f"weight {new}: how many rows {names[new][rows.index(0)]} has is not known{ways(BASE)}")
    for kind, values in lora.extras.items():
        for name in values:
            if kind in _ALONG and (len(names[where[name]]) > 1 or names[where[name]][0][0] == "~"):
                problems.add(f"{kind} {name} is a part of one tensor there{ways(drop_extras(kind))}")
    problems.raise_any(NamingError)
    extras = {
        kind: MappingProxyType({where.get(name, name): value for name, value in values.items()})
        for kind, values in lora.extras.items()
    }
    builds = {new: (parts, sizes[new]) for new, parts in names.items() if any(_own(p) in lora.adapters for p in parts)}
    return replace(
        lora,
        adapters=LazyDeltas(builds, lambda _, how: _joined(lora, *how)),
        extras=MappingProxyType(extras),
        history=(*lora.history, ("names", "hf")),
    )


def _known(model: str, paths: Collection[str], base: BaseModel | None) -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """Path of a module -> its original name, and the modules that are that."""
    front = f"{model}."
    if base is not None:
        paths = [n.removesuffix(".weight").removeprefix(front) for n in base.shapes if n.endswith(".weight")]
    found = dict(originals(paths))
    if model == "unet" and base is None:
        found |= {original: (path,) for original, path in unet_originals().items()}
    # Flux and Stable Diffusion 3 have modules of one name, and each says by others which of the two it is.
    is_flux, is_sd3 = any(path.startswith("single_transformer_blocks.") for path in paths), "pos_embed.proj" in paths
    found = {original: targets for original, targets in found.items() if not (original.startswith(_SD3) and is_flux)}
    known: dict[str, tuple[str, tuple[str, ...]]] = {}
    for original, targets in found.items():
        for path in (target.removeprefix("~") for target in targets):
            if path in known and not (is_flux or is_sd3):
                known[path] = ("", ())
            elif path not in known or original.startswith(_SD3):
                known[path] = (original, targets)
    return {path: said for path, said in known.items() if said[0]}


def _own(part: str) -> str:
    return part.removeprefix("~")


def _rows(part: str, lora: LoadedLora, base: BaseModel | None) -> int:
    delta = lora.get(_own(part))
    if delta is not None:
        return delta.out_features
    if any(_own(part) in lora.extras.get(kind, {}) for kind in _ALONG):
        return -1
    shape = base.shape_of(_own(part)) if base else None
    return shape[0] if shape else 0


def _joined(lora: LoadedLora, parts: Sequence[str], rows: Sequence[int]) -> LoraDelta:
    """One update of several modules, whose rows lie one below the other."""
    there = [(n, delta) for n, part in enumerate(parts) if (delta := lora.get(_own(part))) is not None]
    if len(parts) == 1:
        ((_, delta),) = there
        return _turned(delta) if parts[0][0] == "~" else delta
    common = common_scaling([delta.scaling for _, delta in there])
    places, start = [], 0
    for n, delta in there:
        first, ranks = sum(rows[:n]), slice(start, start + delta.rank)
        where = (slice(first, first + rows[n]), ranks)
        places.append((delta.factors[1], folded(delta.scaling, common), where))
        start += delta.rank
    a = JoinedFactor([(1.0, delta.factors[0]) for _, delta in there], 0)
    return LoraDelta(a, placed((sum(rows), start), places), common)


def _turned(delta: LoraDelta) -> LoraDelta:
    """The halves of its rows the other way round."""
    a, b = delta.factors
    half = b.shape[0] // 2
    return LoraDelta(a, b.mapped(partial(np.roll, shift=half, axis=0), b.shape), delta.scaling, delta.kind)
