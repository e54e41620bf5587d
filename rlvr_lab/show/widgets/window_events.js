// ARES on real responses: how many windows of tokens lie above a threshold, and what is the threshold taken from?

/** Quantile with linear interpolation; NaN of nothing. */
export function quantile(values, level) {
  const sorted = [...values].sort((a, b) => a - b);
  const place = level * (sorted.length - 1);
  const below = Math.floor(place);
  return sorted.length ? sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]) : NaN;
}

/** Means of every `width` tokens in a row; only complete windows. */
export function windows(entropies, width) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const starts = Math.max(0, entropies.length - width + 1);
  return Array.from({ length: starts }, (_, t) => sum(entropies.slice(t, t + width)) / width);
}

/** Mean over responses of the quantile of their tokens, or of their windows. */
export function threshold(responses, width, level, ofWindows) {
  const found = responses.map((row) => quantile(ofWindows ? windows(row, width) : row, level)).filter((q) => !Number.isNaN(q));
  return found.reduce((total, q) => total + q, 0) / found.length;
}

/** Windows above the threshold in each response. */
export function events(responses, width, theta) {
  return responses.map((row) => windows(row, width).filter((value) => value > theta).length);
}

function render({ model, el }) {
  const [responses, buckets] = [model.get("responses"), model.get("buckets")];
  const names = ["easy", "medium", "hard"].filter((name) => buckets.includes(name));
  const sources = ["tokens", "windows"];
  const rows = names.flatMap((name) => sources.map((source) => ({ name, source })));
  const labels = rows.map(({ name, source }) => ({ label: `${name}, ${source}`, hatched: source === "windows" }));
  const chart = barChart("Share of windows above the quantile of tokens, or of windows", labels);
  const output = liveOutput();
  const width = slider("window, tokens", { min: 1, max: 8, step: 1, value: model.get("width") }, String);
  const level = slider("quantile", { min: 0.5, max: 0.99, step: 0.01, value: model.get("level") }, (v) => v.toFixed(2));

  const draw = () => {
    const [w, q] = [width, level].map((control) => Number(control.input.value));
    const theta = Object.fromEntries(sources.map((source) => [source, threshold(responses, w, q, source === "windows")]));
    const count = Object.fromEntries(sources.map((source) => [source, events(responses, w, theta[source])]));
    const total = (of, name) => of.reduce((sum, value, i) => sum + (buckets[i] === name ? value : 0), 0);
    const complete = responses.map((row) => windows(row, w).length);
    chart.draw(rows.map(({ name, source }) => total(count[source], name) / Math.max(1, total(complete, name))));
    const mean = (source, name) => total(count[source], name) / buckets.filter((bucket) => bucket === name).length;
    output.textContent = sources
      .map(
        (source) =>
          `threshold of ${source} ${theta[source].toFixed(2)} nats, events per response ` +
          names.map((name) => `${mean(source, name).toFixed(2)} (${name})`).join(", "),
      )
      .join("; ");
  };
  for (const control of [width, level]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, width.root, level.root, output);
  draw();
}

export default { render };
