"""The experts of a layer: one by one, all in one parameter, or gate and up apart as GGUF keeps them.

An update under one spelling is an update under the others, exactly: ``[B_gate A_gate; B_up A_up]`` is the product of a
block-diagonal B with A's side by side, and the rows of B that gate has are the update of gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorastack.core.delta import LoraDelta
from lorastack.core.placed import common_scaling, folded, placed
from lorastack.errors import ShapeError

_SINGLE = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d{1,9})\.(?P<layer>[a-z0-9_]+)\.weight")
_FUSED = re.compile(r"(?P<block>.+\.experts)\.(?P<parameter>gate_up_proj|down_proj)")
#: What one expert's layers are called, by what they are.
LAYERS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
_PART = {layer: part for part, layers in LAYERS.items() for layer in layers}


def single(name: str) -> tuple[str, int, str] | None:
    """(block, number, part) of the weight of one expert; None for any other.

    >>> single("model.layers.0.mlp.experts.3.w2.weight")
    ('model.layers.0.mlp.experts', 3, 'down')
    """
    match = _SINGLE.fullmatch(name)
    part = _PART.get(match["layer"]) if match else None
    return (match["block"], int(match["number"]), part) if match and part else None


def fused(name: str) -> tuple[str, str] | None:
    """(block, parameter) of the parameter that holds all experts; None for any other.

    >>> fused("model.layers.0.mlp.experts.gate_up_proj")
    ('model.layers.0.mlp.experts', 'gate_up_proj')
    """
    match = _FUSED.fullmatch(name)
    return (match["block"], match["parameter"]) if match else None


def together(parts: Mapping[int, LoraDelta], experts: int) -> LoraDelta:
    """Updates of single experts, by number, as one update of all ``experts``; those that are absent are zero.

    Raises
    ------
    ShapeError
        When they do not have one shape.
    """
    shapes = {(delta.in_features, delta.out_features) for delta in parts.values()}
    if len(shapes) > 1 or max(parts) >= experts:
        said = ", ".join(f"{n}: {delta.in_features} -> {delta.out_features}" for n, delta in parts.items())
        raise ShapeError(f"these updates are not of {experts} experts of one shape: {said}")
    ((n_in, n_out),) = shapes
    rank = max(delta.rank for delta in parts.values())
    common = common_scaling([delta.scaling for delta in parts.values()])
    places = [
        [
            (delta.factors[0], 1.0, (n, slice(0, delta.rank))),
            (delta.factors[1], folded(delta.scaling, common), (n, slice(None), slice(0, delta.rank))),
        ]
        for n, delta in parts.items()
    ]
    a = placed((experts, rank, n_in), [at[0] for at in places])
    b = placed((experts, n_out, rank), [at[1] for at in places])
    return LoraDelta(a, b, common, "experts")


def beside(gate: LoraDelta | None, up: LoraDelta | None) -> LoraDelta:
    """The updates of gate and up, ``[E, out, in]`` each, as one of the parameter that holds both, gate's rows first.

    One of the two may be absent.
    """
    there = [(n, delta) for n, delta in enumerate((gate, up)) if delta is not None]
    first = there[0][1]
    half, experts, n_in = first.out_features, first.num_experts or 0, first.in_features
    if any((d.out_features, d.num_experts, d.in_features) != (half, experts, n_in) for _, d in there):
        raise ShapeError(f"the updates of gate and up differ in shape: {', '.join(str(d) for _, d in there)}")
    common = common_scaling([delta.scaling for _, delta in there])
    rank = sum(delta.rank for _, delta in there)
    a_places, b_places, start = [], [], 0
    for n, delta in there:
        ranks = slice(start, start + delta.rank)
        a_places.append((delta.factors[0], 1.0, (slice(None), ranks)))
        rows = slice(n * half, (n + 1) * half)
        b_places.append((delta.factors[1], folded(delta.scaling, common), (slice(None), rows, ranks)))
        start += delta.rank
    return LoraDelta(
        placed((experts, rank, n_in), a_places), placed((experts, 2 * half, rank), b_places), common, "experts"
    )


def halves(both: LoraDelta) -> tuple[LoraDelta, LoraDelta]:
    """The updates of gate and of up in one of the parameter that holds both."""
    a, b = both.factors
    half = both.out_features // 2
    shape = (b.shape[0], half, b.shape[2])
    gate, up = b.mapped(lambda x: x[:, :half], shape), b.mapped(lambda x: x[:, half:], shape)
    return LoraDelta(a, gate, both.scaling, "experts"), LoraDelta(a, up, both.scaling, "experts")


def one_of(delta: LoraDelta, number: int) -> LoraDelta:
    """The update of a single expert in one of all."""
    a, b = (factor.mapped(lambda x: x[number], factor.shape[1:]) for factor in delta.factors)
    return LoraDelta(a, b, delta.scaling, "linear")
