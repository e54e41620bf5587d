/* Draws every embedded plotly figure with the vendored plotly.js, follows the reader's theme, offers the data as a table. */
(function () {
  "use strict";

  // light palette -> dark palette; rlvr_lab/show/theme.py is the source, a test keeps them equal
  const DARK = {
    "#0961EB": "#0F81FA",
    "#B57B16": "#D69624",
    "#1F6848": "#2EF99B",
    "#B00277": "#E92D97",
    "#222832": "#E6EAEE",
  };
  const MAX_ROWS = 300; // a table longer than this is not read; the notebook has the numbers

  const root = document.documentElement;
  const cssValue = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // Bands are written "rgba(r, g, b, alpha)": swap the part before the opacity.
  const rgbaPrefix = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(", ")},`;

  function inDarkPalette(text) {
    for (const [light, dark] of Object.entries(DARK)) {
      text = text.replaceAll(light, dark).replaceAll(rgbaPrefix(light), rgbaPrefix(dark));
    }
    return text;
  }

  /** The figure's specification with the colours of the current theme. */
  function themed(text) {
    const spec = JSON.parse(root.dataset.theme === "dark" ? inDarkPalette(text) : text);
    const ink = cssValue("--pst-color-text-base");
    const lines = { gridcolor: cssValue("--pst-color-border"), linecolor: ink, tickcolor: ink };
    const layout = { xaxis: {}, yaxis: {}, ...spec.layout };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { ...layout.font, color: ink };
    layout.hoverlabel = { bgcolor: cssValue("--pst-color-surface"), font: { color: ink } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: cssValue("--pst-color-text-muted"), activecolor: ink };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...layout[key], ...lines };
    }
    return { data: spec.data, layout };
  }

  function draw({ box, text }) {
    const { data, layout } = themed(text);
    return Plotly.react(box, data, layout, { responsive: true, displaylogo: false, displayModeBar: "hover" });
  }

  function tableRow(cells, tag) {
    const row = document.createElement("tr");
    for (const content of cells) {
      const cell = document.createElement(tag);
      cell.textContent = typeof content === "number" ? String(Number(content.toPrecision(6))) : String(content);
      if (tag === "th") cell.scope = "col";
      row.append(cell);
    }
    return row;
  }

  /** Long-format table (series, x, y) of what is drawn. Plotly has decoded its packed arrays by then. Where a trace
      names `meta.columns`, the rows are its `customdata` instead, and the other traces only lines between them. */
  function dataTable(box) {
    const title = (axis) => box._fullLayout[axis]?.title?.text || axis[0];
    const told = box._fullData.filter((trace) => trace.meta?.columns);
    const rows = told.flatMap((trace) => trace.customdata);
    for (const trace of told.length ? [] : box._fullData) {
      if (trace.fill === "toself" || !trace.x || !trace.y) continue; // a band's outline is not data to read row by row
      for (let i = 0; i < trace.y.length; i += 1) rows.push([trace.name, trace.x[i], trace.y[i]]);
    }
    const table = document.createElement("table");
    table.className = "table";
    const caption = document.createElement("caption");
    caption.textContent = rows.length > MAX_ROWS ? `First ${MAX_ROWS} of ${rows.length} values` : `${rows.length} values`;
    const head = document.createElement("thead");
    const body = document.createElement("tbody");
    head.append(tableRow(told[0]?.meta.columns ?? ["series", title("xaxis"), title("yaxis")], "th"));
    body.append(...rows.slice(0, MAX_ROWS).map((row) => tableRow(row, "td")));
    table.append(caption, head, body);
    return table;
  }

  function addTable(figure, box) {
    const drawable = box._fullData.some((trace) => ["scatter", "bar"].includes(trace.type));
    if (!drawable) return; // heat maps and the like have no useful x, y table
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const scroll = document.createElement("div");
    summary.textContent = "Data of this figure as a table";
    scroll.className = "rlvr-table-scroll";
    scroll.tabIndex = 0; // a scrolling region must be reachable by keyboard
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Data of the figure");
    details.append(summary, scroll);
    details.addEventListener("toggle", () => scroll.replaceChildren(dataTable(box))); // built only when asked for
    figure.append(details);
  }

  function start() {
    const figures = [...document.querySelectorAll("figure.rlvr-plotly")].map((figure) => {
      const box = figure.querySelector(".rlvr-plotly-box");
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
      return { figure, box, text: figure.querySelector("script").textContent };
    });
    for (const entry of figures) draw(entry).then(() => addTable(entry.figure, entry.box));
    new MutationObserver(() => figures.forEach(draw)).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
