"""Merge: a stack and its base become a new base that needs no adapters; the base itself is never touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from lorastack.algebra.entries import entries_of
from lorastack.base import BaseModel, open_base
from lorastack.base.model import Part
from lorastack.core.adapter import LoadedLora
from lorastack.core.dtypes import our_name
from lorastack.core.stack import LoraStack
from lorastack.errors import ArgumentError, Failures
from lorastack.files import CARD, OutputError, bytes_in_words, check_apart, check_output, signed, whole_output
from lorastack.formats.provenance import Provenance, sources_of
from lorastack.hub import resolve
from lorastack.merging.card import RECIPE, card
from lorastack.merging.folder import Folder
from lorastack.merging.gguf_files import GgufFiles
from lorastack.merging.importance import Importance
from lorastack.merging.one_file import OneFile
from lorastack.merging.plan import plan
from lorastack.merging.rounding import Rounding
from lorastack.merging.stream import How, Merging, Planned, Progress
from lorastack.merging.survival import Survival, estimate
from lorastack.merging.verify import Verified, refuse_worse, verify
from lorastack.pipeline import ahead
from lorastack.recipe import Recipe

#: What is fetched of a base on the hub: its weights, and what else its folder holds.
_WHOLE = ("*.safetensors", "*.json", "*.gguf", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "*.py")


@dataclass(frozen=True)
class Merged:
    """What a merge did, or would do.

    Attributes
    ----------
    out
        The new base; None where nothing was written.
    survivals
        What is left of the update of each changed tensor, estimated before.
    verified
        The same as found in the finished files; empty where that was not asked for.
    size
        Bytes of the new base.
    written
        Bytes of it that were written, the rest being hard links.
    tensors, changed
        How many tensors it has, and how many of them are not the base's own.
    left_out
        Files of the base that are not carried along: other forms of its weights.
    """

    out: Path | None
    survivals: tuple[Survival, ...]
    size: int
    written: int
    tensors: int
    changed: int
    verified: tuple[Verified, ...] = ()
    left_out: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())


class Target(Protocol):
    """A new base that can be written: a folder, or GGUF files."""

    @property
    def size(self) -> int: ...
    @property
    def linkable(self) -> int: ...
    @property
    def tensors(self) -> Sequence[Planned]: ...
    @property
    def as_folder(self) -> bool: ...
    @property
    def left_out(self) -> Sequence[Path]: ...
    @property
    def sources(self) -> Sequence[Path]: ...
    def write(self, out: Path, recipe: str, link: bool, progress: Progress) -> int: ...
    def find(self, out: Path, name: str) -> Part: ...


def merge(
    base: BaseModel | str | Path,
    stack: LoraStack | LoadedLora,
    out: str | Path,
    *,
    exact: bool = False,
    round: str = "nearest",
    seed: int = 0,
    method: str = "cat",
    rank: int | Sequence[int] | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
    density: float | None = None,
    outtype: str | None = None,
    imatrix: str | Path | None = None,
    link: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Write a new base with the stack's updates in its weights; it needs no adapters.

    The updates of all adapters are summed at each weight and rounded once to the type it is stored in. Of DoRA, biases,
    saved modules, trained tokens and resized vocabularies the new base has what a live model computes with. Nothing is
    in memory whole but the factors of one weight.

    Parameters
    ----------
    base
        A Hugging Face folder, of diffusers too, or a hub id (float32, bfloat16, float16); one .safetensors file of an
        image model; or a GGUF file of any type.
    stack
        Both of its lists are merged, or a single adapter at scale 1.
    out
        The new folder; of a base that is one file ``NAME.safetensors``; of a GGUF base ``NAME.gguf``, or a folder
        with as many files as the base has.
    exact
        Sum in float64.
    round
        ``"nearest"``, or ``"stochastic"``, which keeps the mean of a small update that rounding would lose.
    seed
        Of stochastic rounding, and of DARE's masks.
    method, rank, energy, tolerance, density
        As of `LoraStack.bake`: the stack is baked so, and the result merged.
    outtype
        GGUF: the type that changed weights are written in, such as ``"q8_0"``; each its own when not given.
    imatrix
        GGUF: an importance matrix of llama.cpp's, for types that are packed by one.
    link
        Hard links for files that stay as they are, where the disk allows it.
    verify
        Read every changed tensor of the finished files back, before they appear, and hold it against the stack.
    dry_run
        Check everything and estimate what is lost, and write nothing.
    force
        Replace an output that exists: a file, or a folder that a merge wrote and nothing else is in.
    progress
        Called with what is done (``"estimating"``, ``"writing"``, ``"verifying"``), and steps or bytes done and in all.

    Raises
    ------
    NamingError
        When an adapter does not fit the base: one line, and at most ten below it.
    UnsupportedError
        When the base is quantised in a way of its own, or a tensor cannot be written.
    ArgumentError
        When ``out`` exists, or lies in the base.
    OutputError
        When the disk has too little room, or refuses to write; nothing is left then.

    Examples
    --------
    >>> import tempfile, json, numpy as np
    >>> from safetensors.numpy import save_file, load_file
    >>> from lorastack import LoadedLora, LoraStack
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "base").mkdir()
    >>> save_file({"w.weight": np.ones((2, 3), np.float32)}, folder / "base/model.safetensors")
    >>> _ = (folder / "base/config.json").write_text("{}")
    >>> lora = LoadedLora.from_tensors({"w.weight": (np.ones((1, 3)), np.ones((2, 1)))})
    >>> done = merge(folder / "base", LoraStack([(lora, 0.5), (lora, 0.25)]), folder / "new", verify=True)
    >>> done.changed, done.verified[0].error < 1e-6, load_file(folder / "new/model.safetensors")["w.weight"][0].tolist()
    (1, True, [1.75, 1.75, 1.75])
    """
    out = Path(out)
    stack = LoraStack([(stack, 1.0)]) if isinstance(stack, LoadedLora) else stack
    rounding = Rounding(round, seed)
    check_output(out, force)
    model = base if isinstance(base, BaseModel) else open_whole(base)
    made = {"rounding": round} | ({"seed": seed} if round != "nearest" else {}) | ({"exact": True} if exact else {})
    provenance = _provenance(stack, model)
    if method != "cat" or rank is not None or energy is not None or tolerance is not None:
        cut: dict[str, Any] = {"rank": rank, "energy": energy, "tolerance": tolerance, "density": density}
        stack = LoraStack([(stack.bake(model, method=method, seed=seed, **cut), 1.0)])
        made |= stack.entries[0][0].made
    provenance = replace(provenance, made=MappingProxyType(made))
    importance = Importance.read(Path(imatrix)) if imatrix is not None else None
    how = How(exact, rounding, importance, our_name(outtype) if outtype else None)
    target = _target(model, stack, out, how)
    check_apart(out, target.sources)
    sources: list[str | Path] = [*target.sources, *(path for lora, _ in stack.entries for path in sources_of(lora))]
    check_output(out, force, sources)
    survivals = _estimated(target, how, partial(_say, progress, "estimating"))
    written = target.size - (target.linkable if link else 0)
    count, left_out = len(target.tensors), tuple(target.left_out)
    done = Merged(None, tuple(survivals), target.size, written, count, len(survivals), left_out=left_out)
    _check_room(out, written)
    if dry_run:
        return done
    found: list[Verified] = []
    recipe = provenance.to_toml()
    with whole_output(out, force, folder=target.as_folder, sources=sources) as scratch:
        target.write(scratch, recipe, link, _counting(progress, "writing", target.size))
        if target.as_folder:
            _write_words(scratch, out, provenance, survivals)
        if verify:
            found = _verified(target, how, scratch, survivals, partial(_say, progress, "verifying"))
    return replace(done, out=out, verified=tuple(found))


def open_whole(base: str | Path) -> BaseModel:
    """The base as `open_base` opens it; of a hub id, with all that is carried along."""
    resolve(str(base), patterns=_WHOLE)
    return open_base(base)


def _write_words(scratch: Path, out: Path, provenance: Provenance, survivals: Sequence[Survival]) -> None:
    """The card of a new folder, and its recipe, whose paths are seen from where the folder will be."""
    (scratch / CARD).write_bytes(signed(card(provenance, survivals, provenance.base or "")))
    own = sorted({RECIPE, *(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())})
    made = MappingProxyType({**provenance.made, "files": own})
    recipe = Recipe(provenance.ingredients, provenance.base, made).seen_from(out)
    (scratch / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")


def _provenance(stack: LoraStack, base: BaseModel) -> Provenance:
    """The recipe of a merge: the adapters as they were given, and the base."""
    given = LoadedLora("merge", {}, origin=stack.entries)
    said = Provenance.of_lora(given) if len(stack) else Provenance(())
    return replace(said, base=base.name)


def _target(model: BaseModel, stack: LoraStack, out: Path, how: How) -> Target:
    planned = plan(entries_of(stack, model, "merge"), model)
    if model.naming == "hf":
        if how.outtype is not None or how.importance is not None:
            raise ArgumentError(f"base {model.name} is no GGUF file, so that no type is chosen for its weights")
        if model.single_file:
            if out.suffix != ".safetensors":
                raise ArgumentError(
                    f"{out}: this base is one .safetensors file, and so is what it is merged to: give NAME.safetensors"
                )
            return OneFile(planned, how)
        if out.suffix in (".gguf", ".safetensors"):
            raise ArgumentError(f"{out}: this base is a folder, and so is what it is merged to: leave the ending out")
        return Folder(planned, how)
    if out.suffix in (".safetensors", ".bin"):
        raise ArgumentError(f"{out}: this base is a GGUF file, and so is what it is merged to: NAME.gguf, or a folder")
    return GgufFiles(planned, how, out)


def _estimated(target: Target, how: How, say: Callable[[int, int], None]) -> list[Survival]:
    """What is left of every update; a factor with NaN and a sum that its type does not hold are found here too."""
    changed = _changed(target, how)
    survivals = []
    # Two tensors at a time: much of it is waiting for rows from here and there.
    each = [Failures("the stack cannot be merged") for _ in changed]
    jobs = (
        partial(failed.get, partial(_survival, merging)) for failed, (_, merging) in zip(each, changed, strict=True)
    )
    for n, found in enumerate(ahead(jobs)):
        if found is not None:
            survivals.append(found)
        say(n + 1, len(changed))
    failures = Failures("the stack cannot be merged")
    failures.errors = [error for one in each for error in one.errors]
    failures.raise_any()
    return survivals


def _survival(merging: Callable[[], Merging]) -> Survival:
    return estimate(merging())


def _changed(target: Target, how: How) -> list[tuple[str, Callable[[], Merging]]]:
    """Every tensor that is not the base's own: its name, and what makes what merges it, which holds factors."""
    return [
        (one.name, partial(Merging, one.part, one.update, one.kind, how))
        for one in target.tensors
        if one.update is not None
    ]


def _verified(
    target: Target, how: How, out: Path, survivals: Sequence[Survival], say: Callable[[int, int], None]
) -> list[Verified]:
    found = []
    changed = _changed(target, how)
    for n, ((name, merging), survival) in enumerate(zip(changed, survivals, strict=True)):
        found.append(verify(merging(), target.find(out, name), survival))
        say(n + 1, len(changed))
    refuse_worse(found)
    return found


def _check_room(out: Path, size: int) -> None:
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError:  # a file system that does not say
        return
    if free < size:
        raise OutputError(
            f"{out}: it needs {bytes_in_words(size)}, {out.parent} has {bytes_in_words(free)} free; nothing was written"
        )


def _say(progress: Callable[[str, int, int], None] | None, what: str, done: int, total: int) -> None:
    if progress:
        progress(what, done, total)


def _counting(progress: Callable[[str, int, int], None] | None, what: str, total: int) -> Progress:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        _say(progress, what, min(done, total), total)

    return count
