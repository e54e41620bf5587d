// A recorded run, read step by step: curves with a cursor, what the figures at the cursor say, and a verdict on request.

const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Mean of the last `width` measured values up to and including index `at`; null where there are none. */
export function recentMean(values, at, width) {
  const known = values.slice(0, at + 1).filter(finite).slice(-width);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** Mean of the first `width` measured values, but of none after index `at`. */
export function earlyMean(values, at, width) {
  const known = values.slice(0, at + 1).filter(finite).slice(0, width);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** What entropy lost and what accuracy gained since the start: halvings, gain, gain per halving (null: none yet). */
export function paid(entropy, accuracy, at, width) {
  const before = earlyMean(entropy, at, width);
  const after = recentMean(entropy, at, width);
  const halvings = before > 0 && after > 0 ? Math.log2(before / after) : null;
  const start = earlyMean(accuracy, at, width);
  const gain = start === null ? null : recentMean(accuracy, at, width) - start;
  return { halvings, gain, rate: halvings !== null && halvings > 0.25 ? gain / halvings : null };
}

/** SVG path of a curve in a box, lowest value at the bottom; a value that was not measured leaves a gap. */
export function curvePath(values, width, height) {
  const known = values.filter(finite);
  const low = Math.min(...known);
  const span = Math.max(...known) - low || 1;
  let path = "";
  let pen = "M";
  values.forEach((value, i) => {
    if (!finite(value)) {
      pen = "M";
      return;
    }
    const x = (width * i) / Math.max(values.length - 1, 1);
    path += `${pen}${x.toFixed(1)} ${(height * (1 - (value - low) / span)).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

const WIDTH = 300;
const HEIGHT = 36;
const FEW = 5; // steps in an early or a recent mean
const svg = (tag, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
const shown = (value, digits = 3) => (finite(value) ? value.toFixed(digits) : "not measured");

/** One row: name, curve with cursor, value. The curve repeats the numbers, so screen readers skip it. */
function row(label, values) {
  const box = svg("svg", { viewBox: `0 -2 ${WIDTH} ${HEIGHT + 4}`, width: "100%", height: HEIGHT + 4, preserveAspectRatio: "none", "aria-hidden": "true" });
  const line = { fill: "none", stroke: "currentColor", "vector-effect": "non-scaling-stroke" };
  const cursor = svg("line", { ...line, y1: -2, y2: HEIGHT + 2, "stroke-width": 2, "stroke-dasharray": "3 2" });
  box.append(svg("path", { ...line, d: curvePath(values, WIDTH, HEIGHT), "stroke-width": 1.5 }), cursor);
  const number = element("span", { className: "rlw-number" });
  const root = element("li", {}, element("span", { className: "rlw-label", textContent: label }), box, number);
  root.style.cssText = "display: grid; grid-template-columns: 10rem minmax(4rem, 1fr) 6rem; gap: .6rem; align-items: center";
  return {
    root,
    move: (at) => {
      const x = (WIDTH * at) / Math.max(values.length - 1, 1);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      number.textContent = shown(values[at]);
    },
  };
}

function render({ model, el }) {
  const runs = model.get("runs");
  const list = element("ul", { className: "rlw-bars" });
  const output = liveOutput();
  const verdict = element("output", { className: "rlw-output" });
  verdict.setAttribute("aria-live", "polite");
  const choice = element("select", {}, ...runs.map((run, i) => element("option", { value: i, textContent: run.name })));
  const knob = slider("step", { min: 0, max: 1, step: 1, value: 0 }, (value) => String(value));
  const reveal = element("button", { type: "button", className: "rlw-button", textContent: "Show what was planted" });
  let rows = [];
  const run = () => runs[Number(choice.value)];

  const draw = () => {
    const at = Number(knob.input.value);
    rows.forEach((one) => one.move(at));
    const columns = Object.fromEntries(run().columns);
    const { halvings, gain, rate } = paid(columns["token entropy"], columns.accuracy, at, FEW);
    output.textContent =
      `After step ${at} of ${run().steps}: since the first ${FEW} steps entropy has halved ${shown(halvings, 2)} times and ` +
      `accuracy has changed by ${shown(gain, 3)}${rate === null ? "" : `, ${shown(rate, 2)} per halving`}.`;
  };
  const open = () => {
    rows = run().columns.map(([label, values]) => row(label, values));
    list.replaceChildren(...rows.map((one) => one.root));
    knob.input.max = run().steps - 1;
    knob.input.value = Math.min(Number(knob.input.value), run().steps - 1);
    knob.update();
    verdict.textContent = "";
    draw();
  };
  choice.addEventListener("change", () => {
    model.set("run", Number(choice.value));
    model.save_changes();
    open();
  });
  knob.input.addEventListener("input", () => {
    model.set("step", Number(knob.input.value));
    model.save_changes();
    draw();
  });
  reveal.addEventListener("click", () => (verdict.textContent = run().verdict));

  choice.value = model.get("run");
  const chosen = element("label", { className: "rlw-slider" }, element("span", { textContent: "run" }), choice);
  el.classList.add("rlw");
  el.append(knob.root, chosen, list, output, reveal, verdict);
  knob.input.max = run().steps - 1;
  knob.input.value = model.get("step");
  open();
}

export default { render };
