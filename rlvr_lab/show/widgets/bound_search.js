// BAPO's search on a few tokens: which of the two bounds can raise the share that right answers have of the loss?

/** Value of the clipped surrogate, weighted by the token's old probability. */
function value({ p, r, a }, lower, upper) {
  return p * Math.abs(Math.min(r * a, Math.min(Math.max(r, lower), upper) * a));
}

function part(tokens, size) {
  const total = tokens.reduce((sum, token) => sum + size(token), 0);
  return total ? tokens.reduce((sum, token) => sum + (token.a > 0 ? size(token) : 0), 0) / total : NaN;
}

/** The share of positive advantages in the clipped surrogate, the criterion of the paper. */
export function positiveShare(tokens, lower, upper) {
  return part(tokens, (token) => value(token, lower, upper));
}

/** Whether a bound leaves the token its gradient. */
export function live({ r, a }, lower, upper) {
  return a > 0 ? r <= upper : a < 0 ? r >= lower : false;
}

/** The share of positive advantages in r |A| of the tokens that still have a gradient. */
export function gradientShare(tokens, lower, upper) {
  return part(tokens, (token) => (live(token, lower, upper) ? token.r * Math.abs(token.a) : 0));
}

function render({ model, el }) {
  const [p, r, a] = ["probabilities", "ratios", "advantages"].map((name) => model.get(name));
  const tokens = p.map((probability, i) => ({ p: probability, r: r[i], a: a[i] }));
  const rows = ["share of the loss", "share of the gradient"].map((label) => ({ label }));
  const chart = barChart("What tokens of right answers have", [...rows, { label: "tokens with a gradient", hatched: true }]);
  const output = liveOutput();
  const upper = slider("upper bound", { min: 1.2, max: 3, step: 0.05, value: model.get("upper") }, (v) => v.toFixed(2));
  const lower = slider("lower bound", { min: 0.6, max: 0.9, step: 0.02, value: model.get("lower") }, (v) => v.toFixed(2));

  const draw = () => {
    const bounds = [Number(lower.input.value), Number(upper.input.value)];
    const share = positiveShare(tokens, ...bounds);
    const kept = tokens.filter((token) => live(token, ...bounds));
    const right = kept.filter((token) => token.a > 0).length;
    chart.draw([share, gradientShare(tokens, ...bounds), kept.length / tokens.length]);
    output.textContent =
      `Share of the loss ${share.toFixed(3)}, target ${model.get("target").toFixed(2)}: ` +
      `${share < model.get("target") ? "not met" : "met"}. With a gradient: ${right} tokens of right answers, ` +
      `${kept.length - right} of wrong ones, of ${tokens.length}.`;
  };
  for (const control of [upper, lower]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, upper.root, lower.root, output);
  draw();
}

export default { render };
