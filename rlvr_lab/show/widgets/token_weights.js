// One response among the tokens of its batch: which of them keep their gradient, and how much of it, under one setting?
// `top` keeps the share of the batch with the largest values; `steer` weakens tokens with a large one.

/** As the official code of the 80/20 paper rounds: at least one token, else the ceiling. */
export function topCount(n, ratio) {
  return n ? Math.min(n, Math.max(1, Math.floor(n * ratio + 0.9999))) : 0;
}

/** 1 on the topCount largest values, 0 on the others; ties go to the earlier token. */
export function topWeights(values, ratio) {
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
  const weights = values.map(() => 0);
  for (const i of order.slice(0, topCount(values.length, ratio))) weights[i] = 1;
  return weights;
}

/** exp(ln(least) |value| / M), M the largest |value|; 1 everywhere where all are 0. */
export function steerWeights(values, least) {
  const most = Math.max(...values.map(Math.abs));
  return values.map((value) => (most > 0 ? Math.exp((Math.log(least) * Math.abs(value)) / most) : 1));
}

export const RULES = { top: topWeights, steer: steerWeights };

/** Mean of `values` under `weights`, over the sum of the values: the share of them that is kept. */
export function keptShare(values, weights) {
  const total = values.reduce((sum, value) => sum + value, 0);
  return total > 0 ? values.reduce((sum, value, i) => sum + weights[i] * value, 0) / total : 0;
}

/** What a setting does to the batch: mean weight, share of all sizes kept, and of the marked among the kept. */
export function summary(rule, values, sizes, marks, setting) {
  const weights = RULES[rule](values, setting);
  const kept = weights.reduce((sum, weight) => sum + weight, 0);
  return {
    mean: kept / weights.length,
    share: keptShare(sizes, weights),
    marked: marks.reduce((sum, mark, i) => sum + (mark ? weights[i] : 0), 0) / kept,
    weakened: weights.filter((weight) => weight < 0.9).length / weights.length,
  };
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function render({ model, el }) {
  const [rule, values, sizes, marks] = ["rule", "values", "sizes", "marks"].map((name) => model.get(name));
  const tokens = model.get("tokens"); // the first tokens of the batch are those of the response shown
  const top = rule === "top";
  const control = slider(
    top ? "share of tokens kept" : "least weight",
    { min: top ? 0 : 0.01, max: 1, step: 0.01, value: model.get("setting") },
    (value) => value.toFixed(2),
  );
  const line = element("p", {});
  line.style.fontFamily = "ui-monospace, monospace";
  line.style.lineHeight = "2.2";
  const spans = tokens.map((token) => {
    const span = element("span", { textContent: token });
    Object.assign(span.style, { padding: "0.1rem 0.3rem", marginInlineEnd: "0.15rem", borderBottom: "3px solid transparent" });
    line.append(span, " ");
    return span;
  });
  const chart = barChart("Share that is kept", [
    { label: "tokens (mean weight)" },
    { label: model.get("size_name") },
    { label: `${model.get("mark_name")} in it`, hatched: true },
  ]);
  const output = liveOutput();

  const draw = () => {
    const setting = Number(control.input.value);
    const weights = RULES[rule](values, setting);
    spans.forEach((span, i) => {
      // colour is not the only cue: kept tokens are underlined, weakened ones say their weight
      span.style.borderBottomColor = weights[i] > 0.9 ? "currentColor" : "transparent";
      span.textContent = top || weights[i] > 0.9 ? tokens[i] : `${tokens[i]}·${weights[i].toFixed(2)}`;
      span.style.fontWeight = weights[i] > 0.9 ? "600" : "400";
    });
    const all = summary(rule, values, sizes, marks, setting);
    chart.draw([all.mean, all.share, all.marked]);
    output.textContent = top
      ? `Share ${setting.toFixed(2)}: ${topCount(values.length, setting)} of ${values.length} tokens keep their gradient, ` +
        `${percent(all.share)} of ${model.get("size_name")}; ${percent(all.marked)} of them are ${model.get("mark_name")}.`
      : `Least weight ${setting.toFixed(2)}: mean weight ${all.mean.toFixed(3)}, ${percent(all.weakened)} of the tokens below 0.9; ` +
        `${percent(all.share)} of ${model.get("size_name")} is left, where a constant of the same mean leaves ${percent(all.mean)}.`;
  };
  control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(control.root, line, chart.root, output);
  draw();
}

export default { render };
