// Draws every figure of a page in the reader's light or dark scheme, as wide as there is room. COLOURS stands before it.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = [...document.querySelectorAll("script.figure")].map((source) => {
    const { data, layout } = JSON.parse(source.textContent);
    return { data, layout, place: source.previousElementSibling };
  });
  const scheme = (night) => (night ? COLOURS.dark : COLOURS.light);

  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mixed = (scale, share) => {
    const at = Math.max(1, scale.findIndex(([end]) => share <= end));
    const [[low, from], [high, to]] = [scale[at - 1], scale[at]];
    const part = (share - low) / (high - low);
    return rgb(from).map((value, n) => value + part * (rgb(to)[n] - value));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // Of black and white the one that stands out more has at least 4.58 to 1, on any colour.
  const inkOn = (colour) => ((light(colour) + 0.05) ** 2 > 1.05 * 0.05 ? "#000000" : "#ffffff");

  // The numbers in the cells of a heat map, where there is room for them.
  const numbers = (trace, scale, width) => {
    const longest = Math.max(...trace.text.flat().map((text) => text.length));
    if (width < 130 + (14 + 6.5 * longest) * trace.x.length) return [];
    const cells = trace.z.flatMap((row, y) => row.map((z, x) => ({ x, y, z, text: trace.text[y][x] })))
      .filter(({ z }) => z !== null);
    const share = (z) => Math.min(1, Math.max(0, (z - trace.zmin) / (trace.zmax - trace.zmin)));
    return [{
      type: "scatter", mode: "text", hoverinfo: "skip", x: cells.map((cell) => cell.x), y: cells.map((cell) => cell.y),
      text: cells.map((cell) => cell.text), textfont: { color: cells.map((cell) => inkOn(mixed(scale, share(cell.z)))) },
    }];
  };
  const coloured = (trace, night, width) => {
    const { [trace.meta]: scale, lines } = scheme(night), colour = lines[trace.meta];
    if (colour) return [{ ...trace, line: { ...trace.line, color: colour }, marker: { ...trace.marker, color: colour } }];
    if (!scale) return [trace];
    const drawn = { ...trace, colorscale: scale };
    return trace.type === "heatmap" ? [drawn, ...numbers(trace, scale, width)] : [drawn];
  };
  const draw = (night, wanted) => {
    const style = getComputedStyle(document.body);
    const { ink, line } = scheme(night);
    for (const { data, layout, place } of figures) {
      const width = wanted ?? place.clientWidth;
      const axis = { gridcolor: line, linecolor: line, tickcolor: line };
      const short = width < 480 && layout.meta ? { ticktext: layout.meta.short } : {};
      Plotly.react(place, data.flatMap((trace) => coloured(trace, night, width)), {
        ...layout,
        width,
        font: { family: style.fontFamily, size: 12, color: ink },
        xaxis: { ...layout.xaxis, ...axis },
        yaxis: { ...layout.yaxis, ...axis, ...short },
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
    for (const part of document.querySelectorAll("details.paper")) part.open = true;
    draw(false, 640);
  });
  addEventListener("afterprint", () => { printing = false; redraw(); });
})();
