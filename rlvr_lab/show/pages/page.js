// Pages about runs: theme, charts, and transcripts that can be read with mouse or keyboard. Loads nothing.
(function () {
  "use strict";
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // -- theme: the system's, until the reader chooses
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function applyTheme() {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    const button = document.getElementById("theme");
    if (button) button.textContent = root.dataset.theme === "dark" ? "Light theme" : "Dark theme";
    draw();
  }

  // -- charts: made in the light palette, redrawn in the dark one
  const palette = JSON.parse(document.getElementById("palette")?.textContent ?? "{}");
  const rgba = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(", ")},`;
  function themed(text) {
    if (root.dataset.theme === "dark") {
      for (const [light, dark] of Object.entries(palette)) {
        text = text.replaceAll(light, dark).replaceAll(rgba(light), rgba(dark));
      }
    }
    const spec = JSON.parse(text);
    const css = getComputedStyle(root);
    const ink = css.getPropertyValue("--ink").trim();
    const lines = { gridcolor: css.getPropertyValue("--rule").trim(), linecolor: ink, tickcolor: ink };
    spec.layout.font = { ...spec.layout.font, color: ink };
    spec.layout.hoverlabel = { bgcolor: css.getPropertyValue("--panel").trim(), font: { color: ink } };
    for (const key of ["xaxis", "yaxis"]) spec.layout[key] = { ...spec.layout[key], ...lines };
    return spec;
  }
  function draw() {
    if (!window.Plotly) return;
    for (const figure of all("figure.plot")) {
      const spec = themed(figure.querySelector("script").textContent);
      Plotly.react(figure.querySelector(".plot-box"), spec.data, spec.layout, { responsive: true, displayModeBar: false });
    }
  }

  // -- transcripts: one stop for the tab key per response, arrow keys inside it
  function select(box, index) {
    const tokens = all(".t", box);
    if (!tokens.length) return;
    const at = Math.max(0, Math.min(index, tokens.length - 1));
    box.querySelector(".current")?.classList.remove("current");
    tokens[at].classList.add("current");
    box.dataset.at = at;
    box.parentElement.querySelector(".status").textContent = `Token ${at + 1} of ${tokens.length}: ${tokens[at].title}`;
  }
  const MOVES = { ArrowRight: (i) => i + 1, ArrowLeft: (i) => i - 1, Home: () => 0, End: () => Infinity };
  for (const box of all(".tokens[tabindex]")) {
    box.addEventListener("keydown", (event) => {
      if (!(event.key in MOVES)) return;
      event.preventDefault();
      select(box, MOVES[event.key](Number(box.dataset.at ?? -1)));
    });
    for (const kind of ["mouseover", "click"]) {
      box.addEventListener(kind, (event) => {
        const token = event.target.closest(".t");
        if (token) select(box, all(".t", box).indexOf(token));
      });
    }
  }

  // -- choices
  document.getElementById("scale")?.addEventListener("change", (event) => {
    root.style.setProperty("--full", event.target.value);
  });
  const filters = all("select[data-filter]");
  function filter() {
    let shown = 0;
    for (const response of all(".response")) {
      response.hidden = filters.some((f) => f.value && response.dataset[f.dataset.filter] !== f.value);
      shown += response.hidden ? 0 : 1;
    }
    const count = document.getElementById("shown");
    if (count) count.textContent = `${shown} shown`;
  }
  for (const f of filters) f.addEventListener("change", filter);

  document.getElementById("theme")?.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
  });
  system.addEventListener("change", applyTheme);
  document.addEventListener("figures", draw); // where a page has changed what they show
  applyTheme();
})();
