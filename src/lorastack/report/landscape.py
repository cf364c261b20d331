"""Landscape: the score over the scales that a search tried, as one page without anything to fetch."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lorastack.errors import require

if TYPE_CHECKING:
    from lorastack.torch.tune import Tuned

go: Any = require("plotly.graph_objects", "report")

#: Points of the contour's grid along each scale.
_GRID = 80


def landscape(tuned: Tuned) -> str:
    """An HTML page that holds the plotting library too: open it anywhere, without a network.

    For one adapter a line, for two a contour through the trials with the best and the given stack marked, for more
    one line for each trial across an axis for each scale. Failed trials are left out and counted in the title.

    Parameters
    ----------
    tuned
        What `lorastack.torch.tune` found.

    Raises
    ------
    MissingDependencyError
        On import of this module, without plotly: ``pip install 'lorastack[report]'``.

    Example
    -------
    >>> from lorastack.torch import Tuned
    >>> from lorastack.torch.search import Trial
    >>> trials = tuple(Trial({"a": x, "b": y}, x * x + y) for x in (0.0, 0.5, 1.0) for y in (0.0, 1.0))
    >>> page = landscape(Tuned((), {"a": 0.0, "b": 0.0}, 0.0, 2.0, 0.0, trials, "minimize", "score"))
    >>> "</html>" in page, "contour" in page
    (True, True)
    """
    names = list(tuned.scales)
    known = [trial for trial in tuned.trials if math.isfinite(trial.score)]
    points = np.array([[trial.scales[name] for name in names] for trial in known])
    scores = np.array([trial.score for trial in known])
    # Names come out of files, and plotly reads some HTML in its texts.
    labels = [html.escape(name) for name in names]
    draw: Callable[..., list[Any]] = {1: _line, 2: _contour}.get(len(names), _parallel)
    figure = go.Figure(draw(tuned, labels, points, scores))
    best = " ".join(f"{label}:{scale:g}" for label, scale in zip(labels, tuned.scales.values(), strict=True))
    title = f"{tuned.measure} {tuned.score:.4g} at {best}; as given {tuned.equal:.4g}, base {tuned.base:.4g}"
    if tuned.failed:
        title += f"; {tuned.failed} of {len(tuned.trials)} trials failed"
    figure.update_layout(title=title, template="plotly_white", legend={"orientation": "h"})
    if len(names) <= 2:
        figure.update_xaxes(title=f"scale of {labels[0]}")
        figure.update_yaxes(title=f"scale of {labels[1]}" if len(names) == 2 else tuned.measure)
    return figure.to_html(include_plotlyjs=True, full_html=True)


def _line(tuned: Tuned, labels: list[str], points: np.ndarray, scores: np.ndarray) -> list[Any]:
    order = np.argsort(points[:, 0])
    x, given = points[:, 0], list(tuned.trials[0].scales.values())
    return [
        go.Scatter(x=x[order].tolist(), y=scores[order].tolist(), mode="lines+markers", name="trials"),
        _mark(given[0], tuned.equal, "as given", "circle-open"),
        _mark(next(iter(tuned.scales.values())), tuned.score, "best", "star"),
    ]


def _contour(tuned: Tuned, labels: list[str], points: np.ndarray, scores: np.ndarray) -> list[Any]:
    axes = [np.linspace(column.min(), column.max(), _GRID) for column in points.T]
    # Mixtures far off can be worse by orders of magnitude, and would leave one colour for all the rest.
    ordered = np.sort(scores if tuned.direction == "minimize" else -scores)
    worst = ordered[int(0.8 * (len(ordered) - 1))]
    low, high = sorted([tuned.score, float(worst if tuned.direction == "minimize" else -worst)])
    surface = _surface(points, scores, axes).clip(scores.min(), scores.max())
    given = list(tuned.trials[0].scales.values())
    best = list(tuned.scales.values())
    return [
        go.Contour(
            x=axes[0].tolist(),
            y=axes[1].tolist(),
            z=surface.tolist(),
            zmin=low,
            zmax=high if high > low else low + 1,
            ncontours=24,
            colorscale="Viridis",
            reversescale=tuned.direction == "minimize",
            colorbar={"title": tuned.measure},
            hovertemplate=f"{labels[0]} %{{x:.3f}}<br>{labels[1]} %{{y:.3f}}<br>about %{{z:.4g}}<extra></extra>",
        ),
        go.Scatter(
            x=points[:, 0].tolist(),
            y=points[:, 1].tolist(),
            mode="markers",
            marker={"size": 5, "color": "black"},
            text=[f"{score:.4g}" for score in scores],
            hovertemplate=f"{labels[0]} %{{x}}<br>{labels[1]} %{{y}}<br>%{{text}}<extra></extra>",
            name="trials",
        ),
        _mark(given[0], given[1], "as given", "circle-open"),
        _mark(best[0], best[1], "best", "star"),
    ]


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


def _parallel(tuned: Tuned, labels: list[str], points: np.ndarray, scores: np.ndarray) -> list[Any]:
    scales = [{"label": label, "values": column.tolist()} for label, column in zip(labels, points.T, strict=True)]
    ends = {"cmin": float(scores.min()), "cmax": float(np.quantile(scores, 0.8))}
    if tuned.direction == "maximize":
        ends = {"cmin": float(np.quantile(scores, 0.2)), "cmax": float(scores.max())}
    line = {
        "color": scores.tolist(), "colorscale": "Viridis", "reversescale": tuned.direction == "minimize",
        "showscale": True, **ends,
    }  # fmt: skip
    return [go.Parcoords(line=line, dimensions=[*scales, {"label": tuned.measure, "values": scores.tolist()}])]


def _mark(x: float, y: float, name: str, symbol: str) -> Any:
    marker = {"symbol": symbol, "size": 16, "color": "crimson", "line": {"width": 2, "color": "crimson"}}
    return go.Scatter(x=[x], y=[y], mode="markers", marker=marker, name=name)
