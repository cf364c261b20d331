"""Convert an adapter: read in any format, put under the names and into the shape that a target has, written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorastack.base import BaseModel, open_base
from lorastack.converting.experts import in_one, one_by_one
from lorastack.converting.fold import one_rank, one_scaling
from lorastack.converting.names import named_for
from lorastack.core.adapter import LoadedLora
from lorastack.core.extras import KINDS
from lorastack.errors import ArgumentError, FormatError, Problems
from lorastack.files import check_output
from lorastack.formats import save
from lorastack.formats.provenance import sources_of
from lorastack.formats.writers import Format
from lorastack.recipe import load
from lorastack.targets import Experts, Target, format_of, holds, program_of, room_for
from lorastack.ways import Way, drop_extras, ways

_RESIZE = Way("bake it with rank=...", "give it a lower one with `lorastack resize`")
#: What a message calls an update that a target cannot hold.
_KINDS = {"conv": "a convolution", "embedding": "an embedding", "experts": "experts", "linear": "a linear layer"}


def convert(
    adapter: LoadedLora | str | Path,
    out: str | Path,
    *,
    to: Format | None = None,
    target: str | None = None,
    base: BaseModel | str | Path | None = None,
    experts: Experts | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write an adapter in another format; whoever reads it computes the same updates.

    Parameters
    ----------
    adapter
        A file, a folder or hub id of any format, or a loaded adapter.
    out
        ``NAME.gguf``, ``NAME.safetensors`` (kohya, ComfyUI, diffusers), or a folder (PEFT, MLX, diffusers).
    to
        ``"peft"``, ``"gguf"``, ``"kohya"``, ``"comfyui"``, ``"diffusers"`` or ``"mlx"``; the ending of ``out`` says it
        when not given, where it can.
    target
        The program that will read it, such as ``"vllm"`` or ``"llama.cpp"``: in place of ``to``. What it does not look
        at is made to matter no more: ranks are filled up, scalings folded. See `lorastack.targets`.
    base
        The model the adapter was trained on. Needed between GGUF and other names, and for names of kohya that are of no
        well-known model.
    experts
        ``"one by one"`` or ``"fused"``: how the experts of a layer lie in the file, where the target takes either.
    dtype
        ``"f32"``, ``"f16"``, ``"bf16"`` or (GGUF) ``"q8_0"``; each factor keeps its own when not given.
    force
        Replace an output that exists.
    progress
        Called with the bytes of every tensor written.

    Raises
    ------
    FormatError
        Listing everything that the target cannot hold; nothing is written then.
    NamingError
        Listing every weight that has no name there.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from lorastack import LoadedLora, load
    >>> pair = np.ones((1, 4), np.float32), np.ones((3, 1), np.float32)
    >>> lora = LoadedLora.from_tensors({"model.layers.0.self_attn.q_proj.weight": pair}, alpha=2, name="mine")
    >>> out = convert(lora, Path(tempfile.mkdtemp()) / "mlx", target="mlx-lm")
    >>> load(out).get("model.layers.0.self_attn.q_proj.weight").scaling
    2.0
    """
    out = Path(out)
    row = row_of(out, to, target)
    lora = adapter if isinstance(adapter, LoadedLora) else load(adapter)
    check_output(out, force, sources_of(lora))
    model = base if base is None or isinstance(base, BaseModel) else open_base(base)
    return save(fitting(lora, row, model, experts), out, format=row.format, dtype=dtype, force=force, progress=progress)


def fitting(
    lora: LoadedLora, target: Target | str, base: BaseModel | None = None, experts: Experts | None = None
) -> LoadedLora:
    """The adapter as a target takes it: names, layout of experts, one rank and one scaling where it knows no more.

    Raises
    ------
    FormatError
        Listing the extras and the kinds of updates that it cannot hold, and ranks above its largest.
    NamingError
        Listing every weight that has no name there.
    """
    target = program_of(target) if isinstance(target, str) else target
    layout = _layout(target, experts)
    _check_extras(lora, target)
    lora = named_for(lora, target.format, base)
    if target.format != "gguf":  # whose names say how its experts lie
        lora = one_by_one(lora, base) if layout == "one by one" else in_one(lora) if layout else lora
    _check_updates(lora, target)
    if target.one_scaling:
        lora = one_scaling(lora)
    return one_rank(lora) if target.one_rank else lora


def row_of(out: Path, to: str | None, target: str | None) -> Target:
    """What is written to ``out``: for the program ``target``, in the format ``to``, or as the ending says."""
    if target is not None:
        row = program_of(target)
        if to not in (None, row.format):
            raise ArgumentError(f"{row.title} reads {row.format!r}, not {to!r}; give one of the two")
        return row
    if to is not None:
        return format_of(to)
    if out.suffix == ".safetensors":
        raise ArgumentError(
            f"{out}: kohya, ComfyUI and diffusers all have files of this ending"
            + ways(Way("say which with to='kohya'", "say which with --to kohya"))
        )
    return format_of("gguf" if out.suffix == ".gguf" else "peft")


def _layout(target: Target, experts: Experts | None) -> Experts | None:
    if experts not in (None, "one by one", "fused"):
        raise ArgumentError(f"experts is {experts!r}, expected 'one by one' or 'fused'")
    if experts and target.experts and experts != target.experts:
        raise ArgumentError(f"{target.title} takes experts {target.experts}, not {experts}")
    return experts or target.experts


def _check_extras(lora: LoadedLora, target: Target) -> None:
    problems = Problems(f"{lora.name} cannot be written for {target.title}")
    for kind, values in lora.extras.items():
        if values and not holds(target, kind):
            problems.add(f"{kind}: {KINDS[kind]}, such as {next(iter(values))}{ways(drop_extras(kind))}")
    problems.raise_any(FormatError)


def _check_updates(lora: LoadedLora, target: Target) -> None:
    problems = Problems(f"{lora.name} cannot be written for {target.title}")
    for name, delta in lora.adapters.items():
        if delta.kind not in target.kinds:
            problems.add(f"weight {name} is {_KINDS[delta.kind]}, which {target.title} has no place for")
        elif target.ranks and room_for(target, delta.rank) is None:
            problems.add(
                f"weight {name} has rank {delta.rank}, {target.title} takes at most {target.ranks[-1]}{ways(_RESIZE)}"
            )
    problems.raise_any(FormatError)
