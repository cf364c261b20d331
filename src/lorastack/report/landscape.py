"""Landscape: the score over the scales that a search tried, as one page without anything to fetch."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lorastack.report.figures import Drawing, bar, decades, framed, go, label
from lorastack.report.page import page
from lorastack.report.parts import alone, gallery, section, table
from lorastack.report.words import count, number

if TYPE_CHECKING:
    from lorastack.torch.search import Trial
    from lorastack.torch.tune import Tuned

#: Points of the contour's grid along each scale.
_GRID = 80
#: The best trials that are listed.
_BEST = 10
#: On a surface whose colours run from light to dark, marks have a light edge and a dark core.
_ON_SURFACE = {"color": "#000000", "line": {"width": 1.5, "color": "#ffffff"}}

#: Above the plot, where no title of an axis is.
_KEY = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def landscape(tuned: Tuned) -> str:
    """An HTML page that holds the plotting library too: open it anywhere, without a network.

    For one adapter the score over its scale, for two a contour through the trials, for more the score over each
    scale; the best and the given stack are marked. Failed trials are left out and counted.

    Parameters
    ----------
    tuned
        What `lorastack.torch.tune` found.

    Raises
    ------
    MissingDependencyError
        On import of this module, without plotly: ``pip install 'lorastack[report]'``.

    Examples
    --------
    >>> from lorastack.torch import Tuned
    >>> from lorastack.torch.search import Trial
    >>> trials = tuple(Trial({"a": x, "b": y}, x * x + y) for x in (0.0, 0.5, 1.0) for y in (0.0, 1.0))
    >>> page = landscape(Tuned((), {"a": 0.0, "b": 0.0}, 0.0, 2.0, 0.0, trials, "minimize", "score"))
    >>> "</html>" in page, "contour" in page
    (True, True)
    """
    known = [trial for trial in tuned.trials if math.isfinite(trial.score)]
    return page(
        tuned.scales.items(), "LoRA tuning", "\n".join([_summary(tuned), _drawn(tuned, known), _best(tuned, known)])
    )


def _summary(tuned: Tuned) -> str:
    said = (
        f"Of {count(len(tuned.trials), 'mixture')} that were tried this one has the "
        f"{'lowest' if tuned.direction == 'minimize' else 'highest'} {html.escape(tuned.measure)}: "
        f"{number(tuned.score, 5)}. The scales as given have {number(tuned.equal, 5)}, the base alone "
        f"{number(tuned.base, 5)}."
    )
    if tuned.failed:
        said += f" {tuned.failed} of {len(tuned.trials)} trials failed: they have no finite score."
    if tuned.stopped:
        said += " The search was stopped before its end."
    return f'<p class="lead">{said}</p>'


def _drawn(tuned: Tuned, known: list[Trial]) -> str:
    names, measure = list(tuned.scales), html.escape(tuned.measure)
    title = f"The {measure} over the scales"
    marks = f"The star is the best mixture, the {'large dot' if len(names) == 2 else 'ring'} the one given."
    if len(names) == 1:
        return section(title, marks, alone(names[0], _over(tuned, known, names[0])))
    if len(names) == 2:
        said = f"Each dot is a mixture that was tried; between them the {measure} is estimated. {marks}"
        return section(title, said, alone(f"{names[0]} and {names[1]}", _contour(tuned, known)))
    said = f"Each dot is a mixture that was tried, over the scale of one adapter; the others' differ too. {marks}"
    return section(title, said, gallery([(name, _over(tuned, known, name)) for name in names]))


def _best(tuned: Tuned, known: list[Trial]) -> str:
    ordered = _ordered(tuned, known)
    rows = [
        [str(n), number(trial.score, 5), *(f"{scale:.4g}" for scale in trial.scales.values())]
        for n, trial in enumerate(ordered[:_BEST], 1)
    ]
    said = f"The best {len(rows)} of {len(known)}." if len(known) > len(rows) else "All of them, the best first."
    columns = ["place", tuned.measure, *tuned.scales]
    return section("The best mixtures", said, table("Scales of the best mixtures", columns, rows))


def _ordered(tuned: Tuned, known: list[Trial]) -> list[Trial]:
    sign = 1 if tuned.direction == "minimize" else -1
    return sorted(known, key=lambda trial: sign * trial.score)


def _over(tuned: Tuned, known: list[Trial], name: str) -> Drawing | str:
    """The score over one adapter's scale."""
    points = sorted((trial.scales[name], trial.score) for trial in known)
    given = tuned.trials[0].scales[name]
    if len(points) < 2:
        return f"{tuned.measure} {number(tuned.score, 4)} at {tuned.scales[name]:g}, the only one that was tried."
    x, y = [scale for scale, _ in points], [score for _, score in points]
    alone = len(tuned.scales) == 1
    dots = go.Scatter(
        x=x,
        y=y,
        mode="lines+markers" if alone else "markers",
        name="trials",
        meta=0,
        marker={"size": 6, "opacity": 1.0 if alone else 0.6},
        hovertemplate="%{x:.3f}: %{y:.4g}<extra></extra>",
    )
    marks = [_mark(tuned.scales[name], tuned.score, "best", "star", meta=5)]
    if math.isfinite(tuned.equal):
        marks.insert(0, _mark(given, tuned.equal, "as given", "circle-open", meta=5))
    plot = framed([dots, *marks], 320, showlegend=True, legend=_KEY)
    plot.update_xaxes(title=f"scale of {label(name)}")
    plot.update_yaxes(title=label(tuned.measure))
    low, high = min(y), max(y)
    if low > 0 and high > 10 * low:  # far off, a mixture can be worse by orders of magnitude
        ticks = decades(low, high)
        plot.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{one:g}" for one in ticks])
    said = (
        f"{tuned.measure} of {len(points)} mixtures, from {number(low, 4)} to {number(high, 4)}, for scales from "
        f"{min(x):.3g} to {max(x):.3g}; the best is {number(tuned.score, 4)} at {tuned.scales[name]:.4g}, "
        f"as given {number(tuned.equal, 4)} at {given:.4g}."
    )
    return Drawing(plot, said, ["scale", tuned.measure], [[f"{a:.4g}", number(b, 5)] for a, b in points])


def _contour(tuned: Tuned, known: list[Trial]) -> Drawing | str:
    names = list(tuned.scales)
    best, given = list(tuned.scales.values()), list(tuned.trials[0].scales.values())
    if len(known) < 2:
        return f"{tuned.measure} {number(tuned.score, 4)} at {_at(names, best)}, the only one that was tried."
    labels = [label(name) for name in names]
    points = np.array([[trial.scales[name] for name in names] for trial in known])
    scores = np.array([trial.score for trial in known])
    axes = [np.linspace(column.min(), column.max(), _GRID) for column in points.T]
    # Mixtures far off can be worse by orders of magnitude, and would leave one colour for all the rest.
    worst = _ordered(tuned, known)[int(0.8 * (len(known) - 1))].score
    low, high = sorted([tuned.score, worst])
    high = high if high > low else low + 1
    surface = go.Contour(
        x=axes[0].tolist(),
        y=axes[1].tolist(),
        z=_surface(points, scores, axes).clip(scores.min(), scores.max()).tolist(),
        zmin=low,
        zmax=high,
        contours={"start": low, "end": high, "size": (high - low) / 20},
        meta="sequential",
        reversescale=tuned.direction == "minimize",
        line={"width": 0.5},
        colorbar=bar(title=label(tuned.measure)),
        hovertemplate=f"{labels[0]} %{{x:.3f}}<br>{labels[1]} %{{y:.3f}}<br>about %{{z:.4g}}<extra></extra>",
    )
    dots = go.Scatter(
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        mode="markers",
        marker={"size": 6, "color": "#000000", "line": {"width": 1, "color": "#ffffff"}},
        text=[f"{score:.4g}" for score in scores],
        hovertemplate=f"{labels[0]} %{{x:.3f}}<br>{labels[1]} %{{y:.3f}}<br>%{{text}}<extra></extra>",
        name="trials",
    )
    marks = [_mark(given[0], given[1], "as given", "circle"), _mark(best[0], best[1], "best", "star")]
    plot = framed([surface, dots, *marks], 440, showlegend=True, legend=_KEY)
    plot.update_xaxes(title=f"scale of {labels[0]}")
    plot.update_yaxes(title=f"scale of {labels[1]}")
    said = (
        f"{tuned.measure} of {len(known)} mixtures, from {number(scores.min(), 4)} to {number(scores.max(), 4)}; the "
        f"best is {number(tuned.score, 4)} at {_at(names, best)}, as given {number(tuned.equal, 4)} at "
        f"{_at(names, given)}."
    )
    rows = [
        [number(one.score, 5), *(f"{scale:.4g}" for scale in one.scales.values())] for one in _ordered(tuned, known)
    ]
    return Drawing(plot, said, [tuned.measure, *names], rows)


def _at(names: list[str], scales: list[float]) -> str:
    return " ".join(f"{name}:{scale:.4g}" for name, scale in zip(names, scales, strict=True))


def _surface(points: np.ndarray, scores: np.ndarray, axes: list[np.ndarray]) -> np.ndarray:
    """A smooth surface through scattered trials, ``[y, x]``: cubic radial basis functions and a plane.

    Plotly's own contours join what lies on a grid, which trials do not.
    """
    x, y = np.meshgrid(*axes)
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    middle, spread = points.mean(0), np.ptp(points, axis=0)
    spread[spread == 0] = 1.0
    known, wanted = (points - middle) / spread, (grid - middle) / spread
    n = len(known)
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _cubic(known, known)
    system[:n, n:] = np.column_stack([np.ones(n), known])
    system[n:, :n] = system[:n, n:].T
    # Least squares, since few trials or trials on one line do not settle the plane.
    weights = np.linalg.lstsq(system, np.concatenate([scores, np.zeros(3)]), rcond=1e-10)[0]
    found = _cubic(wanted, known) @ weights[:n] + np.column_stack([np.ones(len(wanted)), wanted]) @ weights[n:]
    return found.reshape(x.shape)


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1) ** 3


def _mark(x: float, y: float, name: str, symbol: str, meta: int | None = None) -> Any:
    """One mixture; ``meta`` is its colour where it does not lie on a surface."""
    marker = {"symbol": symbol, "size": 16, **(_ON_SURFACE if meta is None else {"line": {"width": 2}})}
    return go.Scatter(x=[x], y=[y], mode="markers", marker=marker, name=name, meta=meta)
