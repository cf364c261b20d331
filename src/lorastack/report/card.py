"""The figures of an adapter's card: where it changes the model, its singular values, how alike its ingredients are."""

from __future__ import annotations

from lorastack.algebra.compare import compare
from lorastack.core.adapter import LoadedLora
from lorastack.core.stack import LoraStack
from lorastack.formats.card import Figure
from lorastack.formats.provenance import parts_of
from lorastack.report.drawings import Shown, conflicts, cosines, norms, spectra
from lorastack.report.findings import Measured
from lorastack.report.places import grid
from lorastack.report.svg import svg


def figures_of(lora: LoadedLora) -> list[Figure]:
    """The figures, drawn; none of an adapter without low-rank updates.

    Of an ingredient nothing is drawn but how it gets on with the others: its own norms are in its own card.

    Raises
    ------
    NonFiniteError
        Listing every factor that holds NaN or Inf.
    """
    if not lora.adapters:
        return []
    alone = _measured(LoraStack([(lora, 1.0)]))
    shown = [*norms(alone), *spectra(alone)]
    parts = parts_of(lora)
    if len(parts) > 1:
        together = _measured(LoraStack(parts))
        # Of two one number says how alike they are; where, is more to see.
        shown += [*cosines(together), *(conflicts(together) if len(parts) == 2 else [])]
    # What is no low-rank update is in no number of them.
    left_out = [Figure(None, "Not in the figures", f"{line}.") for line in alone.comparison.adapters[0].left_out]
    return [*map(_figure, shown), *left_out]


def _measured(stack: LoraStack) -> Measured:
    # They are for one base, or were baked all the same.
    found = compare(stack, intruders=None, allow_mixed_bases=True)
    return Measured(found, grid(found.weights))


def _figure(one: Shown) -> Figure:
    if isinstance(one.drawing, str):
        return Figure(None, one.alone, one.drawing)
    return Figure(one.file, one.alone, one.drawing.said, svg(one.alone, one.drawing))
