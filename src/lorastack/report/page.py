"""Page: the frame of a report, its styles and its script; one HTML file with nothing to fetch."""

from __future__ import annotations

import html
from typing import Any

from lorastack.errors import require
from lorastack.report.findings import Findings
from lorastack.report.sections import sections

_offline: Any = require("plotly.offline", "report")

#: Nothing is loaded from anywhere, whatever a name or plotly might ask for.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #ffffff; --card: #f5f6f8; --line: #d9dce1;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --paper: #14161a; --card: #1d2026; --line: #343942; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 3rem; max-width: 78rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.4rem, 4.5vw, 2rem); line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.soft, footer { color: var(--soft); font-size: .9rem; }
.lead { font-size: 1.08rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  margin: 1rem 0; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: .6rem; min-width: 0; }
.narrow { max-width: 40rem; }
.plot { width: 100%; overflow: hidden; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
.wide { overflow-x: auto; }
thead th { color: var(--soft); font-weight: 600; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border-radius: .6rem; font-size: .82rem; }
@media (max-width: 46rem) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  tr { display: block; padding: .7rem 0; border-bottom: 1px solid var(--line); }
  tbody th, td { display: flex; gap: .8rem; border: 0; padding: .12rem 0; }
  tbody th { font-size: 1.02rem; }
  tbody th, td { overflow-wrap: anywhere; }
  td::before { content: attr(data-label); flex: 0 0 8.5rem; color: var(--soft); }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --card: #fff; --line: #bbb; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  table { font-size: 7.5pt; hyphens: auto; }
  th, td { padding: .2rem .25rem; }
  .wide { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .grid { display: block; }
  figure { border: 1px solid var(--line); margin: 0 0 .8rem; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

_SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll("script.figure")].map((source) => {
    const { data, layout } = JSON.parse(source.textContent);
    return { data, layout, place: source.previousElementSibling };
  });
  const scales = (night) => ({
    diverging: night
      ? [[0, "#ff8f6b"], [0.25, "#a8432a"], [0.5, "#2a2d34"], [0.75, "#1f6ea3"], [1, "#7cc7ff"]]
      : [[0, "#a8321a"], [0.25, "#ec9a80"], [0.5, "#ffffff"], [0.75, "#7db8dd"], [1, "#0b5a92"]],
    sequential: night
      ? [[0, "#22262e"], [0.5, "#1f7a8c"], [1, "#d5f5e3"]]
      : [[0, "#f4f8f6"], [0.5, "#6dbfb6"], [1, "#0b3c5d"]],
  });
  const draw = (night, width) => {
    const style = getComputedStyle(document.body);
    const ink = night ? "#e6e8eb" : "#1c1e21", line = night ? "#343942" : "#d9dce1";
    for (const { data, layout, place } of figures) {
      const traces = data.map((trace) => (trace.meta in scales(night)
        ? { ...trace, colorscale: scales(night)[trace.meta],
            texttemplate: (width ?? place.clientWidth) < 130 + 40 * trace.x.length ? "" : trace.texttemplate }
        : trace));
      const axis = { gridcolor: line, linecolor: line, tickcolor: line };
      Plotly.react(place, traces, {
        ...layout,
        width: width ?? place.clientWidth,
        font: { family: style.fontFamily, size: 12, color: ink },
        xaxis: { ...layout.xaxis, ...axis },
        yaxis: { ...layout.yaxis, ...axis },
        hoverlabel: { bgcolor: night ? "#343942" : "#ffffff", font: { color: ink } },
      }, { displayModeBar: false, responsive: false });
    }
  };
  let printing = false;
  const redraw = () => { if (!printing) draw(dark.matches); };
  redraw();
  dark.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  // Paper is white, and narrower than most windows.
  addEventListener("beforeprint", () => {
    printing = true;
    for (const part of document.querySelectorAll("details")) part.open = true;
    draw(false, 640);
  });
  addEventListener("afterprint", () => { printing = false; redraw(); });
})();
"""


def page(found: Findings) -> str:
    """The whole report as HTML."""
    names = " + ".join(f"{one.name} × {one.scale:g}".replace("× -", "× −") for one in found.comparison.adapters)
    title = html.escape(names if len(names) < 120 else f"{len(found.adapters)} adapters")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – LoRA report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>The plots need JavaScript; every table below is complete without.</p></noscript>
{sections(found)}
</main>
<script>{_offline.get_plotlyjs()}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
