// The arena's page: which arms are drawn, in which style, and what is said about them. The page's own script draws.
(function () {
  "use strict";
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const { series, baseline, reference } = JSON.parse(document.getElementById("styles").textContent);
  const boxes = all('input[name="arm"]');
  const figures = all("figure.plot").map((figure) => [figure, JSON.parse(figure.querySelector("script").textContent)]);
  const rgba = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(", ")}, 0.18)`;

  /** Colour, dash, symbol and hatching of the arm at a place among those drawn; after four, other pairs of them. */
  function style(arm, place) {
    if (arm === reference) return baseline;
    const shifted = series[(place + Math.floor(place / series.length)) % series.length];
    return { ...shifted, colour: series[place % series.length].colour };
  }

  function dress(trace, look) {
    if (trace.type === "bar") trace.marker = { color: look.colour, pattern: { shape: look.pattern } };
    else if (trace.fill) trace.fillcolor = rgba(look.colour);
    else {
      trace.line = { ...trace.line, color: look.colour, dash: look.dash };
      trace.marker = { ...trace.marker, color: look.colour, symbol: look.symbol };
    }
    for (const axis of ["error_x", "error_y"]) if (trace[axis]) trace[axis].color = look.colour;
  }

  function show() {
    const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
    const compared = chosen.filter((arm) => arm !== reference);
    for (const [figure, spec] of figures) {
      const { told, lead, alt } = spec.layout.meta;
      for (const trace of spec.data) {
        if (!trace.meta?.arm) continue;
        trace.visible = chosen.includes(trace.meta.arm);
        dress(trace, style(trace.meta.arm, Math.max(compared.indexOf(trace.meta.arm), 0)));
      }
      const said = chosen.filter((arm) => told?.[arm]).map((arm) => told[arm]);
      const text = told ? `${lead} ${said.join("; ") || "no arm is chosen"}.` : alt;
      figure.querySelector("script").textContent = JSON.stringify(spec);
      figure.querySelector("figcaption").textContent = text;
      figure.querySelector(".plot-box").setAttribute("aria-label", text);
    }
    for (const row of all("tr[data-arm]")) row.classList.toggle("chosen", compared.includes(row.dataset.arm));
    const most = series.length ** 2;
    const repeated = compared.length > most ? `; beyond ${most} styles repeat` : "";
    document.getElementById("shown").textContent = `${chosen.length} of ${boxes.length} arms drawn${repeated}`;
    document.dispatchEvent(new Event("figures"));
  }

  for (const box of boxes) box.addEventListener("change", show);
  document.getElementById("family").addEventListener("change", (event) => {
    const family = event.target.value;
    if (!family) return;
    for (const box of boxes) box.checked = [box.value, box.dataset.of].includes(family) || box.value === reference;
    show();
  });
  document.getElementById("none").addEventListener("click", () => {
    for (const box of boxes) box.checked = box.value === reference;
    document.getElementById("family").value = "";
    show();
  });
  const level = document.getElementById("accuracy");
  const choose = () => all("[data-level]").forEach((part) => (part.hidden = part.dataset.level !== level.value));
  level?.addEventListener("change", choose);
  if (level) choose();
  show();
})();
