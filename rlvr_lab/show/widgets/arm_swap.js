// Swap the method: two recorded arms beside GRPO, their curves, the frontier, and what is left at equal accuracy.

const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Lowest and highest finite value of some lists; a single value is given some room. */
export function extent(lists) {
  const known = lists.flat().filter(finite);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

/** Points of a curve in a box of 100 x 60, lowest value at the bottom; null where something was not measured. */
export function place(xs, ys, [left, right], [low, high]) {
  return xs.map((x, i) =>
    finite(x) && finite(ys[i]) ? [(100 * (x - left)) / (right - left), 60 * (1 - (ys[i] - low) / (high - low))] : null,
  );
}

/** SVG path through points; a gap lifts the pen. */
export function stroke(points) {
  let pen = "M";
  return points
    .map((point) => {
      const part = point ? `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}` : "";
      pen = point ? "L" : "M";
      return part;
    })
    .join("");
}

/** Closed outline around a curve, from its half-widths, where both are known. */
export function outline({ x, y, half }, across, up) {
  const known = x.map((_, i) => i).filter((i) => finite(x[i]) && finite(y[i]) && finite(half[i]));
  if (known.length < 2) return "";
  const edge = (side) => place(known.map((i) => x[i]), known.map((i) => y[i] + side * half[i]), across, up);
  return `${stroke([...edge(-1), ...edge(1).reverse()])}Z`;
}

/** The arms that a method can be held against: its own controls first, then all others. */
export function rivals(arms, name) {
  const others = arms.filter((arm) => arm.name !== name && arm.role !== "reference");
  return [...others.filter((arm) => arm.of === name), ...others.filter((arm) => arm.of !== name)];
}

const fixed = (value, digits) => (finite(value) ? value.toFixed(digits) : "undefined");

/** Every step at which some arm was evaluated: arms do not all keep one schedule. */
export function steps(arms) {
  return [...new Set(arms.flatMap((arm) => arm.evaluations.map((row) => row.step)))].sort((a, b) => a - b);
}

/** The arm's last evaluation that is not later than a step; its first where there is none. */
export function until(arm, step) {
  return arm.evaluations.filter((row) => row.step <= step).at(-1) ?? arm.evaluations[0];
}

/** What an arm has at its last evaluation up to a step, and how far that lies from GRPO of equal pass@1. */
export function told(arm, step) {
  const now = until(arm, step);
  const sign = now.gap < 0 ? "-" : "+";
  const width = finite(now.half) ? ` ± ${now.half.toFixed(2)}` : "";
  const beyond = now.beyond ? `; ${now.beyond} of ${now.seeds} seeds are beyond GRPO's reach` : "";
  const gap = finite(now.gap) ? `${sign}${Math.abs(now.gap).toFixed(2)}${width}` : "no match";
  return (
    `${arm.name} after step ${now.step}: pass@1 ${fixed(now.accuracy, 3)}, ${fixed(now.distinct, 2)} distinct correct ` +
    `answers. Against GRPO stopped at the same pass@1: ${gap}${beyond}.`
  );
}

const svg = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const LOOKS = [
  { stroke: "currentColor", "stroke-dasharray": "2 3" },
  { stroke: "var(--rl-blue, #0961EB)" },
  { stroke: "var(--rl-amber, #B57B16)", "stroke-dasharray": "7 4" },
];

/** One small chart; its numbers are said in words below, so screen readers skip it. */
function panel(title, curves, marks) {
  const across = extent(curves.map((curve) => curve.x));
  const up = extent(curves.flatMap((c) => [c.y, ...[-1, 1].map((s) => c.y.map((y, i) => (finite(c.half[i]) ? y + s * c.half[i] : y)))]));
  const box = svg("svg", { viewBox: "-2 -2 104 64", width: "100%", height: 120, preserveAspectRatio: "none", "aria-hidden": "true" });
  const line = { fill: "none", "stroke-width": 2, "vector-effect": "non-scaling-stroke" };
  curves.forEach((curve, i) => {
    box.append(svg("path", { d: outline(curve, across, up), fill: LOOKS[i].stroke, "fill-opacity": 0.14 }));
    box.append(svg("path", { d: stroke(place(curve.x, curve.y, across, up)), ...line, ...LOOKS[i] }));
  });
  marks.forEach(([x, y], i) => {
    const [point] = place([x], [y], across, up);
    if (point) box.append(svg("circle", { cx: point[0], cy: point[1], r: 2, fill: LOOKS[i + 1].stroke }));
  });
  const range = `${title}: ${up.map((v) => v.toPrecision(2)).join(" to ")}`;
  return element("div", {}, element("div", { textContent: range, style: "font-size: .85rem" }), box);
}

function render({ model, el }) {
  const arms = model.get("arms");
  const reference = arms.find((arm) => arm.role === "reference");
  const named = (name) => arms.find((arm) => arm.name === name);
  const choice = (text) => {
    const select = element("select", {});
    return { select, root: element("label", { className: "rlw-slider" }, element("span", { textContent: text }), select) };
  };
  const options = (list) => list.map((arm) => element("option", { value: arm.name, textContent: arm.name }));
  const method = choice("method, solid");
  const rival = choice("held against, dashed");
  const places = steps(arms.filter((arm) => arm !== reference));
  const chosen = Math.max(places.findLastIndex((step) => step <= model.get("at")), 0);
  const knob = slider("read after step", { min: 0, max: places.length - 1, step: 1, value: chosen }, (i) => String(places[i]));
  const charts = element("div", {});
  charts.style.cssText = "display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .5rem 1.5rem";
  const output = liveOutput();
  output.style.whiteSpace = "pre-line"; // one line per arm
  const note = element("p", { className: "rlw-label", style: "white-space: normal" });

  const draw = () => {
    const pair = [named(method.select.value), named(rival.select.value)];
    const at = places[Number(knob.input.value)];
    const rows = pair.map((arm) => until(arm, at));
    const by = Object.keys(reference.curves).map((title) =>
      panel(title, [reference, ...pair].map((arm) => arm.curves[title]), rows.map((row) => [row.step, row[title]])),
    );
    const frontier = [reference, ...pair].map((arm) => arm.frontier);
    const paths = panel("frontier, distinct against pass@1", frontier, rows.map((row) => [row.accuracy, row.distinct]));
    charts.replaceChildren(...by, paths);
    // an arm that was not evaluated then says its last figures: the step asked for must be told as well
    output.textContent = [`Read after step ${at}.`, ...pair.map((arm) => told(arm, at))].join("\n");
    note.textContent = `${pair.map((arm) => `${arm.name}: ${arm.note}`).join("; ")}. Dotted: GRPO.`;
  };
  const swap = () => {
    rival.select.replaceChildren(...options(rivals(arms, method.select.value)));
    draw();
  };
  method.select.append(...options(arms.filter((arm) => arm.role === "method")));
  method.select.value = model.get("method");
  method.select.addEventListener("change", swap);
  rival.select.addEventListener("change", draw);
  knob.input.addEventListener("input", draw);
  el.classList.add("rlw");
  el.append(knob.root, method.root, rival.root, charts, output, note);
  swap();
}

export default { render };
