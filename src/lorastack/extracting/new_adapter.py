"""Extract: the adapter that is the difference of a fine-tuned model and its base, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorastack.algebra.cut import Cut, Loss, overall
from lorastack.base import BaseModel, open_base
from lorastack.base.all_names import with_all_names
from lorastack.core.adapter import LoadedLora
from lorastack.core.delta import LoraDelta
from lorastack.errors import ArgumentError, Failures, UnsupportedError
from lorastack.extracting.pairs import Pairs, pairs_of
from lorastack.extracting.rest import Saved, changed, saved
from lorastack.extracting.update import Changed, How
from lorastack.ways import Way, argument, ways

#: Called with the weights done and the weights there are.
Progress = Callable[[int, int], None]


def extract(
    finetuned: BaseModel | str | Path,
    base: BaseModel | str | Path,
    rank: int | Sequence[int] | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    exact: bool = False,
    seed: int = 0,
    embeddings: bool = False,
    save_rest: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> LoadedLora:
    """The adapter that makes the fine-tuned model of its base: the best approximation of every weight's difference.

    The difference ``D = W' - W`` is taken in float32 and approximated by ``B @ A`` of low rank through a truncated SVD
    (Eckart and Young 1936), by the randomised range finder of Halko, Martinsson and Tropp (2011, arXiv:0909.4061) with
    power iterations until they find no more. One weight is in memory at a time, of experts one expert.

    Parameters
    ----------
    finetuned, base
        Hugging Face folders or hub ids (float32, bfloat16, float16), or two GGUF files of one architecture.
    rank
        The rank of every weight, at most; of several the smallest that keeps ``energy`` or ``tolerance``.
    energy
        The smallest rank of each weight that keeps this part of the difference's squared norm.
    tolerance
        The same, said as a relative error: ``energy=e`` is ``tolerance=√(1 - e)``.
    exact
        Decompose every difference in full, which takes far longer.
    seed
        Of the random sketches: the same seed gives the same adapter.
    embeddings
        Embeddings and heads too, as low-rank updates.
    save_rest
        What changed and is not low-rank (norms, biases, embeddings, resized vocabularies) is saved whole, as
        ``modules_to_save`` and biases; it is only listed otherwise.
    progress
        Called with the weights done and the weights there are.

    Returns
    -------
    LoadedLora
        Factors in float32, ``B = U √S`` and ``A = √S Vᵀ`` at scaling 1, under the base's names. ``made`` has the exact
        relative error of each weight and of all (``errors``, ``error``), their ``ranks``; ``rest``, what changed and is
        not low-rank, with its relative change; ``reshaped``, ``added`` and ``missing``, weights of another shape and
        those that only one model has; ``unsaved``, those of them that ``save_rest`` found no place for.

    Raises
    ------
    UnsupportedError
        When a model is quantised in a way of its own, or the two are not of one architecture.
    NamingError
        When most layers have other shapes: it is another base.
    FormatError
        When a file is damaged or a shard is missing, of both models.
    NonFiniteError
        Listing every weight in which a model has NaN or Inf.
    ArgumentError
        When no linear layer changed, or neither rank, energy nor tolerance is given.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> weight, change = np.ones((4, 3), np.float32), np.outer(np.arange(4), np.ones(3)).astype(np.float32)
    >>> for which, array in (("base", weight), ("tuned", weight + change)):
    ...     (folder / which).mkdir()
    ...     save_file({"h.0.q.weight": array}, folder / which / "model.safetensors")
    ...     _ = (folder / which / "config.json").write_text("{}")
    >>> lora = extract(folder / "tuned", folder / "base", rank=1)
    >>> delta = lora.adapters["h.0.q.weight"]
    >>> np.allclose(delta.b @ delta.a, change, atol=1e-5), lora.made["error"] < 1e-6
    (True, True)
    """
    cut = Cut.of(rank, energy, tolerance)
    if cut is None:
        raise ArgumentError(
            f"it is not said where to cut; give {argument('rank')}, {argument('energy')} or {argument('tolerance')}"
        )
    tuned, model = _opened(finetuned, base)
    pairs = pairs_of(tuned, model, embeddings)
    how = How(cut, exact, seed)
    deltas, losses, rest = _compared(pairs, tuned, model, how, progress)
    if not deltas:
        more = f"; {len(rest) + len(pairs.reshaped)} weights that are none changed, such as " if rest else ""
        raise ArgumentError(
            f"no linear layer of {tuned.name} differs from that of {model.name}{more}{next(iter(rest), '')}"
        )
    kept = Saved()
    if save_rest:
        if model.naming == "gguf":
            raise UnsupportedError(
                "a GGUF adapter has no place for whole weights"
                + ways(Way("leave save_rest out", "leave --save-rest out"))
            )
        names = [*rest, *pairs.reshaped, *pairs.added]
        kept = saved(names, pairs, list(map(_module, deltas)), tuned, model)
    made = _said(how, losses, rest, pairs, tuned, model) | ({"unsaved": kept.unsaved} if kept.unsaved else {})
    return LoadedLora(
        name=name or Path(tuned.name).stem,
        adapters=MappingProxyType(deltas),
        extras=MappingProxyType({kind: MappingProxyType(values) for kind, values in kept.extras.items()}),
        metadata=MappingProxyType(_metadata(model) | kept.metadata),
        naming=model.naming,
        made=MappingProxyType(made),
    )


def _opened(finetuned: BaseModel | str | Path, base: BaseModel | str | Path) -> tuple[BaseModel, BaseModel]:
    failures = Failures("the models cannot be compared")
    found = [
        given if isinstance(given, BaseModel) else failures.get(partial(open_base, given))
        for given in (finetuned, base)
    ]
    failures.raise_any()
    tuned, model = found
    assert tuned is not None
    assert model is not None
    for one in (tuned, model):
        if not one.stored:
            raise ArgumentError(f"{one.name} is in memory only, where no file has its weights; give its folder")
    return with_all_names(tuned), with_all_names(model)


def _compared(
    pairs: Pairs, tuned: BaseModel, model: BaseModel, how: How, progress: Progress | None
) -> tuple[dict[str, LoraDelta], dict[str, Loss], dict[str, float]]:
    """The updates and what they lose, and the relative change of what is not low-rank; each only where it changed.

    Once a weight has failed, no other is decomposed: they are only read, for all that fail to be named.
    """
    deltas: dict[str, LoraDelta] = {}
    losses: dict[str, Loss] = {}
    rest: dict[str, float] = {}
    failures = Failures("the models cannot be compared")
    total = len(pairs.low_rank) + len(pairs.others)
    for n, weight in enumerate((*pairs.low_rank, *pairs.others)):
        kind = pairs.low_rank.get(weight)
        if kind is None or failures:
            change = failures.get(partial(changed, weight, tuned, model))
            if change is not None:
                rest[weight] = change
        elif found := failures.get(partial(Changed(weight, kind, tuned, model).delta, how)):
            deltas[weight], losses[weight] = found
        if progress:
            progress(n + 1, total)
    failures.raise_any()
    return deltas, losses, rest


def _said(
    how: How, losses: Mapping[str, Loss], rest: Mapping[str, float], pairs: Pairs, tuned: BaseModel, model: BaseModel
) -> dict[str, Any]:
    """How it was made, as the file keeps it."""
    said: dict[str, Any] = {"method": "extract", "finetuned": tuned.name, "base": model.name}
    if how.cut.ranks:
        said["rank"] = list(how.cut.ranks) if len(how.cut.ranks) > 1 else how.cut.ranks[0]
    if how.cut.tolerance is not None:
        said["tolerance"] = how.cut.tolerance
    said |= {"exact": True} if how.exact else {"seed": how.seed}
    said["error"] = overall(losses)
    said["errors"] = {weight: loss.error for weight, loss in losses.items()}
    said["ranks"] = {weight: loss.rank for weight, loss in losses.items()}
    listed: dict[str, Any] = {
        "rest": dict(rest),
        "reshaped": {name: [list(shape) for shape in shapes] for name, shapes in pairs.reshaped.items()},
        "added": list(pairs.added),
        "missing": list(pairs.missing),
    }
    return said | {key: value for key, value in listed.items() if value}


def _metadata(model: BaseModel) -> dict[str, Any]:
    if model.naming == "gguf":
        return {"general.architecture": model.architecture_name}
    return {"base_model_name_or_path": model.name}


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")
